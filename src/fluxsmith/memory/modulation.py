"""Modulation look-ahead: 27 % of FLUX's weights see one row a sample, so they are evaluated ahead of use and need no device memory.

What they see depends on noise level, guidance and pooled text alone. `LookAhead` holds the weights on the host and evaluates all layers
for the inputs that are to come in one sweep; a forward pass then reads its rows. Adapters on these layers stay live: the table holds
the frozen product, they add to it. Inputs that nobody announced are swept by themselves, so a result never depends on what was known.
"""

from collections.abc import Iterable
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

ROWS = 64  # samples in one sweep: 129 MiB of rows in bf16 for the whole model


class Conditioning(NamedTuple):
    """What `FluxDiT.conditioning` is called with, in the types and on the device of the forward pass."""

    t: Tensor  # (B,)
    guidance: Tensor | None  # (B,)
    y: Tensor  # (B, D_pooled)

    def key(self) -> bytes:
        """Equal bits, equal key; the type that products are computed in belongs to it."""
        device = self.y.device.type
        kind = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""
        parts = [self.t, self.y] if self.guidance is None else [self.t, self.guidance, self.y]
        bits = [part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for part in parts]
        return b"|".join([kind.encode(), str([(part.dtype, tuple(part.shape)) for part in parts]).encode(), *bits])


Rows = dict[nn.Module, Tensor]


class LookAhead:
    """The modulation layers' weights on the host, and tables of what they give. It is the transformer's `run_modulation` itself."""

    def __init__(
        self, dit: FluxDiT, device: torch.device, *, host: Host | None = None, copier: Copier | None = None, bakes: bool = False
    ) -> None:
        """`bakes`: adapters of any kind go into the rows of each sweep; for drawing, where they do not change within a request."""
        self.dit = dit
        self.bakes = bakes
        self.vector = dit.conditioning
        self.layers = [module for module in dit.modules() if isinstance(module, Modulation)]
        host = host or Host(pin=device.type == "cuda")
        masters: list[Master] = [take_out([layer.lin], host) for layer in self.layers]
        self.lane = Lane(masters, device, Schedule(len(masters), 2), copier)
        self.tables: dict[str, dict[bytes, Rows]] = {}
        self.now: tuple[Tensor, Rows] | None = None
        self.sweeps = self.missed = 0

    def attach(self) -> None:
        """From now on the transformer's modulations are rows of the tables."""
        self.dit.conditioning = self.conditioning  # type: ignore[method-assign]  # of this one model
        self.dit.run_modulation = self

    @property
    def host_bytes(self) -> int:
        """Size of the weights on the host."""
        return self.lane.host_bytes

    @torch.no_grad()
    def sweep(self, coming: Iterable[Conditioning], *, name: str) -> None:
        """Evaluate all layers for these inputs; they replace the table of this name. Weights come to the device once."""
        table: dict[bytes, Rows] = {}
        vectors: dict[bytes, Tensor] = {}
        for one in coming:
            key = one.key()
            if key not in table:
                table[key], vectors[key] = {}, F.silu(self.vector(*one))
        if self.bakes:
            self.tables.clear()  # adapters may have changed since
        self.tables.pop(name, None)  # its memory is free for the new one
        for number, layer in enumerate(self.layers):
            views = own(self.lane.bring(number), 0)
            adapters = layer.lin.adapters
            layer.lin.adapters = adapters if self.bakes else nn.ModuleDict()
            try:
                for key, x in vectors.items():
                    table[key][layer] = functional_call(layer.lin, views, (x,))
            finally:
                layer.lin.adapters = adapters
        self.lane.drop()
        self.tables[name] = table
        self.sweeps += 1

    def knows(self, one: Conditioning) -> bool:
        """True if its rows are there."""
        return any(one.key() in table for table in self.tables.values())

    def conditioning(self, t: Tensor, guidance: Tensor | None, y: Tensor) -> Tensor:
        """As FluxDiT.conditioning; from here on rows are those of these inputs. Raises ValueError if a gradient has to flow here."""
        vec = self.vector(t, guidance, y)
        if vec.requires_grad:
            raise ValueError('the conditioning vector is trained: memory.modulation = "resident" is needed')
        key = Conditioning(t, guidance, y).key()
        rows = next((table[key] for table in self.tables.values() if key in table), None)
        if rows is None:
            self.missed += 1
            self.sweep([Conditioning(t, guidance, y)], name="unannounced")
            rows = self.tables["unannounced"][key]
        self.now = (vec, rows)
        return vec

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
