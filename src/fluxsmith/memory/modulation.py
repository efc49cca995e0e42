"""Modulation look-ahead: 27 % of FLUX's weights see one row a sample, so they are evaluated ahead of use and need no device memory.

What they see depends on noise level, guidance and pooled text alone. `LookAhead` holds the weights on the host and evaluates all layers
for the inputs that are to come in one sweep; a forward pass then reads its rows. Adapters on these layers stay live: the table holds
the frozen product, they add to it. Where all inputs are announced (`trusted`) rows are found on the device and the host waits for
nothing; elsewhere the host compares, and inputs that nobody announced are swept by themselves.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fluxsmith.memory.masters import Host, Master, own, take_out
from fluxsmith.memory.slots import Copier, Lane, Schedule
from fluxsmith.models.blocks import Mods
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.layers import Modulation, ModulationOut
from fluxsmith.models.linear import Linear

ROWS = 64  # samples whose rows are held at once: 129 MiB in bf16 for the whole model


class Conditioning(NamedTuple):
    """What `FluxDiT.conditioning` is called with, in the types and on the device of the forward pass."""

    t: Tensor  # (B,)
    guidance: Tensor | None  # (B,)
    y: Tensor  # (B, D_pooled)

    @property
    def parts(self) -> list[Tensor]:
        """All that is given."""
        return [self.t, self.y] if self.guidance is None else [self.t, self.guidance, self.y]

    def kind(self) -> str:
        """Types and shapes, and the type that products are computed in."""
        device = self.y.device.type
        inner = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""
        return f"{inner} {[(part.dtype, tuple(part.shape)) for part in self.parts]}"

    def key(self) -> bytes:
        """Equal bits, equal key. Reading them makes the host wait for the device."""
        bits = [part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for part in self.parts]
        return b"|".join([self.kind().encode(), *bits])

    def values(self) -> Tensor:
        """Everything in one row, without loss, on the device."""
        wide = torch.float64 if any(part.dtype == torch.float64 for part in self.parts) else torch.float32
        return torch.cat([part.detach().flatten().to(wide) for part in self.parts])


class Table:
    """Rows of all layers for inputs of one kind."""

    def __init__(self) -> None:
        self.places: dict[bytes, int] = {}
        self.vectors: list[Tensor] = []  # silu(vec) of each, until the rows are there
        self.values: list[Tensor] = []
        self.known = self.rows = torch.empty(0)  # (n, width of the values), (n, B, outputs of all layers)

    def lookup(self, one: Conditioning) -> tuple[Tensor, Tensor]:
        """Its rows (B, outputs of all layers) and whether they are there, found on the device."""
        same = (self.known == one.values()).all(dim=1)
        return self.rows.index_select(0, same.to(torch.uint8).argmax().view(1))[0], same.any()


Tables = dict[str, Table]  # kind -> table


class LookAhead:
    """The modulation layers' weights on the host, and tables of what they give. It is the transformer's `run_modulation` itself."""

    def __init__(
        self, dit: FluxDiT, device: torch.device, *, host: Host | None = None, copier: Copier | None = None, bakes: bool = False
    ) -> None:
        """`bakes`: for drawing, where adapters do not change within a request and all of its inputs are announced: adapters of any kind
        go into the rows, and rows are found on the device.
        """
        self.dit = dit
        self.bakes = bakes
        self.vector = dit.conditioning
        self.layers = [module for module in dit.modules() if isinstance(module, Modulation)]
        self.widths = [layer.lin.out_features for layer in self.layers]
        host = host or Host(pin=device.type == "cuda")
        masters: list[Master] = [take_out([layer.lin], host) for layer in self.layers]
        self.lane = Lane(masters, device, Schedule(len(masters), 2), copier)
        self.tables: dict[str, Tables] = {}
        self.trusted = ""  # name of the table that has all inputs of passes with gradient
        self.doubts: list[Tensor] = []
        self.now: tuple[Tensor, dict[nn.Module, Tensor]] | None = None
        self.sweeps = self.missed = 0

    def attach(self) -> None:
        """From now on the transformer's modulations are rows of the tables."""
        self.dit.conditioning = self.conditioning  # type: ignore[method-assign]  # of this one model
        self.dit.run_modulation = self

    @property
    def host_bytes(self) -> int:
        """Size of the weights on the host."""
        return self.lane.host_bytes

    def sweep(self, coming: Iterable[Conditioning], *, name: str) -> None:
        """Evaluate all layers for these inputs; they replace the table of this name. Weights come to the device once."""
        for _ in self.sweeping(coming, name=name):
            pass
        self.lane.drop()

    @torch.no_grad()
    def sweeping(self, coming: Iterable[Conditioning], *, name: str) -> Iterator[None]:
        """As `sweep`, layer by layer, for who wants to do other work in between (and to drop the lane then)."""
        self.confirm()
        if self.bakes:
            self.tables.clear()  # adapters may have changed since
        self.tables.pop(name, None)  # its memory is free for the new one
        made: Tables = {}
        for one in coming:
            table, key = made.setdefault(one.kind(), Table()), one.key()
            if key not in table.places:
                table.places[key] = len(table.places)
                table.vectors.append(F.silu(self.vector(*one)))
                table.values.append(one.values())
        start = 0
        for number, (layer, width) in enumerate(zip(self.layers, self.widths, strict=True)):
            self._evaluate(number, layer, made.values(), slice(start, start + width))
            start += width
            yield
        for table in made.values():
            table.known = torch.stack(table.values)
            table.vectors, table.values = [], []
        self.tables[name] = made
        self.sweeps += 1

    def _evaluate(self, number: int, layer: Modulation, tables: Iterable[Table], columns: slice) -> None:
        views, adapters = own(self.lane.bring(number), 0), layer.lin.adapters
        layer.lin.adapters = adapters if self.bakes else nn.ModuleDict()
        try:
            for table in tables:
                for place, x in enumerate(table.vectors):
                    row = functional_call(layer.lin, views, (x,))
                    if not table.rows.numel():
                        table.rows = row.new_empty(len(table.vectors), row.shape[0], sum(self.widths))
                    table.rows[place, :, columns] = row
        finally:
            layer.lin.adapters = adapters

    def knows(self, one: Conditioning) -> bool:
        """True if its rows are there."""
        return self._stored(one) is not None

    def confirm(self) -> None:
        """Raise RuntimeError if rows were taken, since the last call, for inputs that had not been announced. Waits for the device."""
        doubts, self.doubts = self.doubts, []
        if doubts and not bool(torch.stack(doubts).all()):
            raise RuntimeError('modulation rows were taken for an input that was not announced; write memory.modulation = "resident"')

    def conditioning(self, t: Tensor, guidance: Tensor | None, y: Tensor) -> Tensor:
        """As FluxDiT.conditioning; from here on rows are those of these inputs. Raises ValueError if a gradient has to flow here."""
        vec = self.vector(t, guidance, y)
        if vec.requires_grad:
            raise ValueError('the conditioning vector is trained: memory.modulation = "resident" is needed')
        one = Conditioning(t, guidance, y)
        row = self._trusted(one)
        if row is None:
            row = self._stored(one)
        if row is None:
            self.missed += 1
            self.sweep([one], name="unannounced")
            row = self._stored(one)
        if row is None:
            raise RuntimeError("a sweep left its own input out")
        self.now = (vec, dict(zip(self.layers, row.split(self.widths, dim=-1), strict=True)))
        return vec

    def _trusted(self, one: Conditioning) -> Tensor | None:
        """The rows of an input that is known to be announced; None where the host has to compare."""
        name = "request" if self.bakes else self.trusted if torch.is_grad_enabled() else ""
        table = self.tables.get(name, {}).get(one.kind())
        if table is None:
            return None
        row, is_there = table.lookup(one)
        self.doubts.append(is_there)
        return row

    def _stored(self, one: Conditioning) -> Tensor | None:
        kind = one.kind()
        found = [tables[kind] for tables in self.tables.values() if kind in tables]
        key = one.key() if found else b""
        return next((table.rows[table.places[key]] for table in found if key in table.places), None)

    def __call__(self, module: nn.Module, vec: Tensor) -> Mods:
        """As `run_module`."""
        if self.now is None or vec is not self.now[0] or not isinstance(module, Modulation):
            raise ValueError("the conditioning vector was changed on its way: no row is known for it")
        row = self.now[1][module] if self.bakes else with_adapters(module.lin, vec, self.now[1][module])
        chunks = row[:, None].chunk(3 * module.parts, dim=-1)
        return tuple(ModulationOut(*chunks[3 * i : 3 * i + 3]) for i in range(module.parts))


def with_adapters(layer: Linear, vec: Tensor, row: Tensor) -> Tensor:
    """The frozen product of a modulation layer (B, out) and what its additive adapters add, with gradient."""
    for adapter in layer.adapters.values():
        row = adapter(F.silu(vec), row)
    return row


def announce(dit: FluxDiT, coming: Iterable[Conditioning], *, name: str = "request") -> None:
    """Sweep inputs that are to come, where the transformer has a look-ahead; nothing otherwise."""
    if isinstance(dit.run_modulation, LookAhead):
        dit.run_modulation.sweep(coming, name=name)


def confirm(dit: FluxDiT) -> None:
    """After a request: raise RuntimeError if rows were taken for inputs that had not been announced."""
    if isinstance(dit.run_modulation, LookAhead):
        dit.run_modulation.confirm()
