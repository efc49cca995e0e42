"""Encoders, transformer and autoencoder that are on the card only while they work, within a limit of its memory.

`Components.on("ae")` sends the others to the host first. A transformer larger than the limit is streamed in part: `blocks_over` says
how many of its blocks have to wait on the host.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from fluxsmith.memory.masters import move_resident

GIB = 2**30
WORKING = GIB  # left free for activations while the transformer works


class Components:
    """The parts of a model by role; all wait on the host at first."""

    def __init__(
        self, parts: Mapping[str, nn.Module], device: torch.device, move: Callable[[nn.Module, torch.device], None] = move_resident
    ) -> None:
        self.parts = dict(parts)
        self.device = device
        self.move = move
        self.working: set[str] = set()

    def on(self, *roles: str) -> None:
        """These work now, and only these are on the device."""
        wanted = set(roles) & set(self.parts)
        for role in sorted(self.working - wanted):
            self.move(self.parts[role], torch.device("cpu"))
        if self.device.type == "cuda" and self.working - wanted:
            torch.cuda.empty_cache()
        for role in sorted(wanted - self.working):
            self.move(self.parts[role], self.device)
        self.working = wanted


def size_of(module: nn.Module) -> int:
    """Bytes of a module's tensors that have memory."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.device.type != "meta")


def blocks_over(blocks: list[int], rest: int, limit: float, *, slots: int = 2) -> int:
    """How many of these blocks (bytes each) must be streamed so that the others, `rest` bytes and the slots stay within `limit` GiB."""
    budget, total = int(limit * GIB) - WORKING - rest, sum(blocks)
    if total <= budget:
        return 0
    places = slots * max(blocks)
    for count in range(1, len(blocks) + 1):
        gone = sum(blocks[(2 * i + 1) * len(blocks) // (2 * count)] for i in range(count))
        if total - gone + places <= budget:
            return count
    return len(blocks)
