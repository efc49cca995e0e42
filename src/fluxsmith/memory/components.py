"""Encoders, transformer and autoencoder that are on the card only while they work, each by a rule of its own.

`Components.on("ae")` sends the others to where they rest first: the host, their files, or nowhere. Where a rule says so, layers of a part
wait elsewhere even while it works, and come each for its own computation. What fits a limit of memory is planned in `drawing.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

from fluxsmith.memory.block_swap import BlockSwap, Streaming, evenly
from fluxsmith.memory.layer_stream import LayerStream, layers_of
from fluxsmith.memory.masters import Host, frozen, move_resident
from fluxsmith.memory.slots import Lane
from fluxsmith.models.flux import FluxDiT

Place = Literal["disk", "host", "device"]
Move = Callable[[nn.Module, torch.device], None]
Refill = Callable[[str, nn.Module], None]


class Rule(NamedTuple):
    """Where the weights of one part are. The type they are stored in is the base's (`quant`), that of its products the model's."""

    rest: Place = "host"
    """While the part does not work. `disk`: they are let go, and read from their file again."""
    work: Place = "device"
    """While it works. `host` and `disk`: each layer comes for its own computation, from memory or from a memory-mapped copy in `folder`.
    Parts without a stack of layers (an autoencoder) come whole all the same."""
    persistent: int | None = None
    """Weights (their number) that may stay on the device while the part works; further layers come from `work`, or from the host."""
    folder: Path | None = None
    """For `work = "disk"`."""

    def check(self, role: str, *, has_refill: bool) -> None:
        """Raise ValueError for values that exclude each other."""
        if self.work == "disk" and self.folder is None:
            raise ValueError(f'{role}: work = "disk" needs a folder')
        if self.rest == "disk" and self.streams():
            raise ValueError(f'{role}: what comes layer by layer rests on the host, or on disk with work = "disk"; not rest = "disk"')
        if self.rest == "disk" and not has_refill:
            raise ValueError(f'{role}: rest = "disk" needs a way to read the weights again')

    def streams(self) -> bool:
        """May layers have to wait elsewhere while the part works?"""
        return self.work != "device" or self.persistent is not None


class Components:
    """The parts of a model by role; all rest at first."""

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        device: torch.device,
        *,
        rules: Mapping[str, Rule] | None = None,
        refill: Refill | None = None,
        move: Move = move_resident,
    ) -> None:
        """`refill(role, module)` gives a part that rests on disk its weights again, on the device (`LazyModels.refill`)."""
        self.parts = dict(parts)
        self.device = device
        self.move = move
        self.refill = refill
        self.working: set[str] = set()
        self.rules = {role: (rules or {}).get(role, Rule()) for role in self.parts}
        self.lanes: dict[str, Lane] = {}
        for role, rule in self.rules.items():
            rule.check(role, has_refill=refill is not None)
            if rule.streams():
                self._stream(role, self.parts[role], rule)

    def _stream(self, role: str, module: nn.Module, rule: Rule) -> None:
        layers: Sequence[nn.Module] = module.blocks if isinstance(module, FluxDiT) else layers_of(module)
        count = waiting(module, layers, rule)
        if not count:
            return
        host = Host(pin=self.device.type == "cuda", disk=rule.folder if rule.work == "disk" else None)
        chosen = tuple(evenly(count, len(layers)))
        stream = (
            BlockSwap(module, Streaming(chosen), self.device, host=host)
            if isinstance(module, FluxDiT)
            else LayerStream([layers[index] for index in chosen], self.device, host=host)
        )
        stream.attach()
        self.lanes[role] = stream.lane

    def on(self, *roles: str) -> None:
        """These work now, and only these (and what rests there) are on the device."""
        wanted = set(roles) & set(self.parts)
        leaving = self.working - wanted
        for role in sorted(leaving):
            self._leave(role)
        if self.device.type == "cuda" and leaving:
            torch.cuda.empty_cache()
        for role in sorted(wanted - self.working):
            self._come(role)
        self.working = wanted

    def _leave(self, role: str) -> None:
        if role in self.lanes:
            self.lanes[role].drop()
        rest = self.rules[role].rest
        if rest == "disk":
            let_go(self.parts[role])
        elif rest == "host":
            self.move(self.parts[role], torch.device("cpu"))

    def _come(self, role: str) -> None:
        module = self.parts[role]
        if self.refill is not None and self.rules[role].rest == "disk" and is_gone(module):
            self.refill(role, module)
        self.move(module, self.device)

    def rest(self) -> None:
        """Nothing works: parts that rest on disk are let go, before anything is drawn too."""
        self.on()
        for role, rule in self.rules.items():
            if rule.rest == "disk" and not is_gone(self.parts[role]):
                let_go(self.parts[role])


def waiting(module: nn.Module, layers: Sequence[nn.Module], rule: Rule) -> int:
    """How many layers of a part have to wait elsewhere while it works."""
    if rule.persistent is None:
        return len(layers) if rule.work != "device" else 0
    counts = [sum(param.numel() for param in layer.parameters()) for layer in layers]
    total = sum(param.numel() for param in module.parameters())
    for count in range(len(layers)):
        gone = sum(counts[index] for index in (evenly(count, len(layers)) if count else ()))
        if total - gone <= rule.persistent:
            return count
    return len(layers)


@torch.no_grad()
def let_go(module: nn.Module) -> None:
    """Leave a part's frozen tensors without memory; adapters stay."""
    gone = {id(tensor) for tensor in frozen(module).values()}
    for owner in module.modules():
        for name, param in [*owner.named_parameters(recurse=False)]:
            if id(param) in gone:
                setattr(owner, name, nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False))
        for name, buffer in [*owner.named_buffers(recurse=False)]:
            if id(buffer) in gone:
                setattr(owner, name, torch.empty_like(buffer, device="meta"))


def is_gone(module: nn.Module) -> bool:
    """Was it let go?"""
    first = next(module.parameters(), None)
    return first is not None and first.device.type == "meta"


def size_of(module: nn.Module) -> int:
    """Bytes of a module's tensors that have memory."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.device.type != "meta")
