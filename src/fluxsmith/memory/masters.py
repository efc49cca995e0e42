"""Weights that wait on the host: all tensors of a unit (a block, a modulation layer) in one contiguous buffer, one view each.

One buffer means one copy for each visit. On a card it is pinned; with a folder it is a memory-mapped file, which the system may drop
and read again. Nothing frozen is ever written back; trained weights wait in the same way (`trained_swap.py`).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

ADAPTERS = ".adapters."
ALIGNED = 256  # bytes: views of any type begin where a card reads best


class Entry(NamedTuple):
    """Where a tensor lies in the buffer."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass
class Host:
    """Where masters are kept."""

    pin: bool = False
    disk: Path | None = None
    """Folder of memory-mapped masters; their files are nameless, so nothing is left behind."""
    say: Callable[[str], None] = lambda text: None
    """Told once when memory cannot be pinned."""
    pinner: Callable[[Tensor], Tensor] = Tensor.pin_memory
    is_pageable: bool = field(default=False, init=False)

    def buffer(self, size: int) -> Tensor:
        """Host memory, (size,) bytes."""
        if self.disk is not None:
            return self._mapped(self.disk, size)
        made = torch.empty(size, dtype=torch.uint8)
        if not self.pin or self.is_pageable:
            return made
        try:
            return self.pinner(made)
        except RuntimeError as error:  # the system's limit on locked memory
            self.is_pageable = True
            self.say(f"host memory cannot be pinned ({str(error).splitlines()[0]}): weights come slower, from pageable memory")
            return made

    def _mapped(self, folder: Path, size: int) -> Tensor:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"master-{id(self):x}-{len([*folder.iterdir()])}.bin"
        made = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        path.unlink()  # the mapping keeps it
        return made


class Master:
    """The tensors of one unit by name, in one buffer."""

    def __init__(self, tensors: Mapping[str, Tensor], host: Host) -> None:
        self.entries: dict[str, Entry] = {}
        place = stop = 0
        for name, tensor in tensors.items():
            stop = place + tensor.numel() * tensor.element_size()
            self.entries[name] = Entry(tensor.dtype, tuple(tensor.shape), place, stop)
            place = -(-stop // ALIGNED) * ALIGNED
        self.buffer = host.buffer(stop)
        for name, view in self.views(self.buffer).items():
            view.copy_(tensors[name].detach())

    @property
    def size(self) -> int:
        """Bytes of the buffer."""
        return self.buffer.numel()

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tensors, as views of this buffer or of a copy of it."""
        return {name: buffer[e.start : e.stop].view(e.dtype).view(e.shape) for name, e in self.entries.items()}


def frozen(module: nn.Module) -> dict[str, Tensor]:
    """Names and tensors that never change: no adapters, nothing that is trained, nothing that was taken out already."""
    params = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    found = {**params, **dict(module.named_buffers())}
    return {name: tensor for name, tensor in found.items() if ADAPTERS not in f".{name}" and tensor.device.type != "meta"}


@torch.no_grad()
def take_out(modules: Sequence[nn.Module], host: Host, skip: Callable[[str], bool] = lambda name: False) -> Master:
    """One master for the frozen tensors of these modules, named `number/name`; in the modules they are left without memory."""
    tensors = {f"{i}/{name}": t for i, module in enumerate(modules) for name, t in frozen(module).items() if not skip(name)}
    master = Master(tensors, host)
    for key, tensor in tensors.items():
        number, _, name = key.partition("/")
        owner_name, _, leaf = name.rpartition(".")
        empty = torch.empty_like(tensor, device="meta")
        is_param = isinstance(tensor, nn.Parameter)
        setattr(modules[int(number)].get_submodule(owner_name), leaf, nn.Parameter(empty, requires_grad=False) if is_param else empty)
    return master


def own(views: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The views of one module of a unit, by the module's own names."""
    return {name.partition("/")[2]: view for name, view in views.items() if name.startswith(f"{number}/")}


@torch.no_grad()
def move_resident(module: nn.Module, device: torch.device, stay: Collection[nn.Parameter] = ()) -> None:
    """Everything that has memory goes to the device, but for `stay`; parameters keep their identity: an optimizer may hold them already."""
    kept = {id(param) for param in stay}
    for param in module.parameters():
        if param.device.type != "meta" and id(param) not in kept:
            param.data = param.data.to(device)
    for owner in module.modules():
        for name, buffer in [*owner.named_buffers(recurse=False)]:
            if buffer.device.type != "meta":
                setattr(owner, name, buffer.to(device))
