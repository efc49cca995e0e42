"""Several processes that train as one: who am I, and the mean of gradients. The only file that imports accelerate.

Micro-batch m of the run goes to process m % size, so N processes with accumulation A compute what one process with
accumulation N * A computes. Works under `accelerate launch -m fluxsmith ...` and `torchrun -m fluxsmith ...`.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fluxsmith.errors import ConfigError


class World:
    """A group of processes; the default is this one alone."""

    rank = 0
    size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and talks to the user."""
        return self.rank == 0

    def average_gradients(self, params: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes."""

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the processes."""
        return value

    def total(self, value: Tensor) -> Tensor:
        """Sum of a tensor over the processes."""
        return value

    def barrier(self) -> None:
        """Wait for the others."""

    def share(self, value: Any) -> Any:
        """The main process's value, everywhere."""
        return value

    def any(self, flag: bool) -> bool:
        """True everywhere if it is true anywhere."""
        return flag


class Distributed(World):
    """Processes started by torchrun or accelerate; gloo on CPU, nccl on cards."""

    def __init__(self, device: torch.device, rank: int, size: int) -> None:
        super().__init__(device)
        self.rank = rank
        self.size = size

    def average_gradients(self, params: Iterable[nn.Parameter]) -> None:
        """One all-reduce over all gradients laid end to end."""
        gradients = [param.grad for param in params if param.grad is not None]
        if not gradients:
            return
        flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the processes."""
        return self.total(value) / self.size

    def total(self, value: Tensor) -> Tensor:
        """Sum of a tensor over the processes."""
        total = value.detach().to(self.device, copy=True)  # nccl reduces on the card only
        dist.all_reduce(total)
        return total

    def barrier(self) -> None:
        """Wait for the others."""
        dist.barrier()

    def share(self, value: Any) -> Any:
        """The main process's value, everywhere (pickled by torch, between our own processes only)."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, flag: bool) -> bool:
        """True everywhere if it is true anywhere."""
        total = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(total)
        return bool(total.item() > 0)


def join_world(device: str) -> World:
    """This process alone, or its place among those that a launcher started. Raises ConfigError for a card that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "train.device = cuda, but there is no CUDA device", fix="write train.device = cpu, or install torch for your card"
        )
    if not dist.is_torchelastic_launched():
        return World(torch.device(device))
    from accelerate import PartialState  # seconds of import time that one process does not need

    state = PartialState(cpu=device == "cpu")
    if state.num_processes == 1:
        return World(torch.device(device))
    return Distributed(torch.device(state.device or device), state.process_index, state.num_processes)
