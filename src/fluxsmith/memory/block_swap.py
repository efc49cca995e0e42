"""Blocks whose weights wait on the host and visit the device only while they compute: block swap, streaming, grouped offload.

The weights are frozen, so nothing is ever copied back. Under activation checkpointing a block comes once for the forward and once for
the backward pass; what its recomputation keeps are views of the slot, which stays untouched until an earlier block is called, and that
happens only when the block's own gradients are done.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fluxsmith.config.memory import MemoryConfig
from fluxsmith.errors import ConfigError
from fluxsmith.memory.masters import Host, frozen, move_resident, own, take_out
from fluxsmith.memory.sizes import evenly_spaced
from fluxsmith.memory.slots import Copier, Lane, Schedule
from fluxsmith.models.blocks import Mods
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.layers import Modulation

__all__ = ["BlockSwap", "Streaming", "evenly", "move_resident", "streaming", "swapped_blocks"]

SLOTS = 2


def swapped_blocks(count: int, depth: int, depth_single: int) -> list[int]:
    """Indices of the blocks that `count` swaps, as sd-scripts divides it: half of it double blocks, the rest times two single ones.

    The last ones of each stack are taken. Raises ConfigError when fewer than two blocks of a stack would stay.
    """
    doubles = count // 2
    singles = 2 * (count - doubles)
    if doubles > max(0, depth - 2) or singles > max(0, depth_single - 2):
        fits = [n for n in range(count) if n // 2 <= max(0, depth - 2) and 2 * (n - n // 2) <= max(0, depth_single - 2)]
        why = f"{doubles} of {depth} double and {singles} of {depth_single} single blocks; two of each stay"
        fix = f"use at most {fits[-1]}, or memory.stream_blocks, which takes any of them"
        raise ConfigError(f"memory.swap_blocks = {count} is too many", why=why, fix=fix)
    return [*range(depth - doubles, depth), *range(depth + depth_single - singles, depth + depth_single)]


def evenly(count: int, total: int) -> list[int]:
    """As `sizes.evenly_spaced`. Raises ConfigError for more blocks than there are."""
    if count > total:
        raise ConfigError(f"memory.stream_blocks = {count} is too many", why=f"there are {total} blocks", fix='write "all"')
    return evenly_spaced(count, total)


class Streaming(NamedTuple):
    """Which blocks travel, and how."""

    indices: tuple[int, ...] = ()
    per_unit: int = 1
    """Blocks that travel together."""
    slots: int = SLOTS
    prefetch: bool = True


def streaming(memory: MemoryConfig, depth: int, depth_single: int) -> Streaming:
    """What a config asks for; no indices if nothing. Raises ConfigError for numbers that a model of this depth cannot meet."""
    total = depth + depth_single
    if memory.offload is not None:
        per_unit = 1 if memory.offload.level == "leaf" else min(memory.offload.blocks_per_group, total)
        return Streaming(tuple(range(total)), per_unit, SLOTS if memory.offload.streams else 1, memory.offload.streams)
    if memory.stream_blocks:
        return Streaming(tuple(evenly(total if memory.stream_blocks == "all" else memory.stream_blocks, total)))
    return Streaming(tuple(swapped_blocks(memory.swap_blocks, depth, depth_single)))


class BlockSwap:
    """Host masters of some blocks' weights. `attach` makes the calls bring them in; adapters inside the blocks stay where they are."""

    def __init__(
        self, dit: FluxDiT, how: Streaming, device: torch.device, *, host: Host | None = None, copier: Copier | None = None
    ) -> None:
        self.dit = dit
        self.device = device
        host = host or Host(pin=device.type == "cuda")
        blocks, chosen = dit.blocks, sorted(how.indices)
        self.place: dict[nn.Module, tuple[int, int]] = {}  # block -> unit, number within it
        self.mod_place: dict[nn.Module, tuple[int, int]] = {}
        masters, mod_masters = [], []
        for unit, group in enumerate(chosen[i : i + how.per_unit] for i in range(0, len(chosen), how.per_unit)):
            mods = [module for i in group for module in blocks[i].modules() if isinstance(module, Modulation) and frozen(module)]
            if mods:  # run apart from their block, so they have masters of their own
                self.mod_place |= {module: (len(mod_masters), number) for number, module in enumerate(mods)}
                mod_masters.append(take_out(mods, host))
            self.place |= {blocks[index]: (unit, number) for number, index in enumerate(group)}
            masters.append(take_out([blocks[index] for index in group], host))
        self.lane = Lane(masters, device, Schedule(len(masters), how.slots, prefetch=how.prefetch), copier)
        self.mod_lane = Lane(mod_masters, device, Schedule(len(mod_masters), how.slots, prefetch=how.prefetch), copier)
        self.before: tuple[int, int] = (-1, -1)
        self.views: dict[str, Tensor] = {}

    def attach(self) -> None:
        """From now on `dit.call` and `dit.run_modulation` bring weights in for each call of a swapped block."""
        run, run_modulation = self.dit.call, self.dit.run_modulation

        def call(block: nn.Module, *inputs: object) -> tuple[Tensor, Tensor]:
            place = self.place.get(block)
            return run(block, *inputs) if place is None else functional_call(block, self._block(place), inputs)

        def modulation(module: nn.Module, vec: Tensor) -> Mods:
            place = self.mod_place.get(module)
            return run_modulation(module, vec) if place is None else functional_call(module, self._modulation(place, vec), (vec,))

        self.dit.call = call
        if self.mod_place:
            self.dit.run_modulation = modulation

    def _block(self, place: tuple[int, int]) -> dict[str, Tensor]:
        is_next_of_unit = place[0] == self.before[0] and place[1] > self.before[1]
        self.before = place
        if not is_next_of_unit:
            self.views = self.lane.bring(place[0], returns=torch.is_grad_enabled())
        return own(self.views, place[1])

    def _modulation(self, place: tuple[int, int], vec: Tensor) -> dict[str, Tensor]:
        """Modulations are not recomputed; where a backward pass will read their weights it gets copies of its own."""
        if torch.is_grad_enabled() and vec.requires_grad:
            master = self.mod_lane.masters[place[0]]
            views = master.views(master.buffer.to(self.device, non_blocking=True))
        else:
            views = self.mod_lane.bring(place[0])
        return own(views, place[1])

    @property
    def host_bytes(self) -> int:
        """Size of all masters."""
        return self.lane.host_bytes + self.mod_lane.host_bytes


def checked(how: Streaming, recomputed: Sequence[bool]) -> None:
    """Raise ConfigError where a streamed block would keep its weights for the backward pass instead of coming again."""
    bad = [index for index in how.indices if not recomputed[index]]
    if bad:
        why = f"blocks {', '.join(map(str, bad[:4]))} are streamed and not recomputed"
        fix = "write memory.checkpointing = true with checkpointing_interval = 1 and no kept or selective blocks, or stream fewer"
        raise ConfigError("streamed blocks must be recomputed in the backward pass", why=why, fix=fix)
