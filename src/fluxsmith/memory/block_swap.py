"""Blocks whose weights wait in host memory and visit the device only while they compute.

The weights are frozen, so nothing is ever copied back. Under activation checkpointing a block comes once for the forward and once for
the backward pass; the graph of the recomputed block holds its visiting weights until its gradients are done.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fluxsmith.errors import ConfigError
from fluxsmith.models.blocks import Mods
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.layers import Modulation

ADAPTERS = ".adapters."


def swapped_blocks(count: int, depth: int, depth_single: int) -> list[int]:
    """Indices of the blocks that `count` swaps, as sd-scripts divides it: half of it double blocks, the rest times two single ones.

    The last ones of each stack are taken. Raises ConfigError when fewer than two blocks of a stack would stay.
    """
    doubles = count // 2
    singles = 2 * (count - doubles)
    if doubles > max(0, depth - 2) or singles > max(0, depth_single - 2):
        fits = [n for n in range(count) if n // 2 <= max(0, depth - 2) and 2 * (n - n // 2) <= max(0, depth_single - 2)]
        why = f"{doubles} of {depth} double and {singles} of {depth_single} single blocks; two of each stay"
        raise ConfigError(f"memory.swap_blocks = {count} is too many", why=why, fix=f"use at most {fits[-1]}")
    return [*range(depth - doubles, depth), *range(depth + depth_single - singles, depth + depth_single)]


class BlockSwap:
    """Host masters of some blocks' weights. `attach` frees the device's copies; adapters inside the blocks stay where they are."""

    def __init__(self, dit: FluxDiT, indices: Iterable[int], device: torch.device) -> None:
        self.dit = dit
        self.device = device
        self.masters: dict[nn.Module, dict[str, Tensor]] = {}  # of blocks, and apart from them of their modulations
        blocks = dit.blocks
        for index in indices:
            self._take(blocks[index])

    def _take(self, block: nn.Module) -> None:
        """Modulations are run apart from their block, so they have masters of their own."""
        master = _moved_out(block, pin=self.device.type == "cuda")
        for path, module in block.named_modules():
            if isinstance(module, Modulation):
                own = {name: tensor for name, tensor in master.items() if name.startswith(f"{path}.")}
                self.masters[module] = {name.removeprefix(f"{path}."): tensor for name, tensor in own.items()}
                master = {name: tensor for name, tensor in master.items() if name not in own}
        self.masters[block] = master

    def attach(self) -> None:
        """From now on `dit.call` brings weights in for each call of a swapped block."""
        run = self.dit.call
        def call(block: nn.Module, *inputs: object) -> tuple[Tensor, Tensor]:
            master = self.masters.get(block)
            if master is None:
                return run(block, *inputs)
            return functional_call(block, self._visiting(master), inputs)

        def modulation(module: nn.Module, vec: Tensor) -> Mods:
            master = self.masters.get(module)
            return module(vec) if master is None else functional_call(module, self._visiting(master), (vec,))

        self.dit.call, self.dit.run_modulation = call, modulation

    def _visiting(self, master: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in master.items()}

    @property
    def host_bytes(self) -> int:
        """Size of all masters."""
        return sum(tensor.numel() * tensor.element_size() for master in self.masters.values() for tensor in master.values())


@torch.no_grad()
def move_resident(module: nn.Module, device: torch.device) -> None:
    """Everything that has memory goes to the device; parameters keep their identity, so an optimizer may hold them already."""
    for param in module.parameters():
        if param.device.type != "meta":
            param.data = param.data.to(device)
    for owner in module.modules():
        for name, buffer in [*owner.named_buffers(recurse=False)]:
            setattr(owner, name, buffer.to(device))


@torch.no_grad()
def _moved_out(block: nn.Module, *, pin: bool) -> dict[str, Tensor]:
    """The block's frozen tensors on the host; in the block they are left without memory."""
    master: dict[str, Tensor] = {}
    for name, param in [*block.named_parameters()]:
        if ADAPTERS in f".{name}" or param.requires_grad:
            continue
        host = param.detach().cpu()
        master[name] = host.pin_memory() if pin else host
        owner_name, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(owner_name), leaf, nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False))
    return master
