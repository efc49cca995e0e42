"""Optimizer state and update in host memory: each trained tensor has a copy there, gradients go to it, new weights come back.

A gradient leaves the device as soon as the backward pass has made it, beside the computing. Copies are pinned on a card. With swapped
blocks a copy is the block's master itself.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fluxsmith.config.schema import RunConfig
from fluxsmith.errors import ConfigError
from fluxsmith.memory.masters import Host
from fluxsmith.memory.trained_swap import TrainedSwap
from fluxsmith.train.distributed import World
from fluxsmith.train.placement import Placement
from fluxsmith.train.trained import Trained


class HostCopies(Placement):
    """What the optimizer holds (`params`), and the model's tensors that follow it."""

    def __init__(self, trained: Mapping[str, nn.Parameter], host: Host, *, masters: bool = False, swap: TrainedSwap | None = None) -> None:
        """`masters`: the copies are fp32, whatever the model's tensors are."""
        self.host = host
        self.swap = swap
        self.model = dict(trained)
        self.params = {name: nn.Parameter(self._copy(param, masters=masters)) for name, param in trained.items()}
        self.buffers: dict[str, Tensor] = {}  # host memory of gradients, used again in each step
        device = next((param.device for param in trained.values() if param.device.type == "cuda"), None)
        self.stream = None if device is None else torch.cuda.Stream(device)
        for name, param in trained.items():
            param.register_post_accumulate_grad_hook(lambda param, name=name: self._arrived(name, param))

    def _copy(self, param: nn.Parameter, *, masters: bool) -> Tensor:
        dtype = torch.float32 if masters else param.dtype
        if self.swap is not None and param in self.swap.home and dtype == param.dtype:
            return param.detach()  # at rest: the master of its block
        return self._memory(param, dtype).copy_(param.detach())

    def _memory(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        return self.host.buffer(like.numel() * dtype.itemsize).view(dtype).view(like.shape)

    @torch.no_grad()
    def _arrived(self, name: str, param: Tensor) -> None:
        """A gradient is complete for this micro-batch: on the host it joins those before."""
        own, gradient = self.params[name], param.grad
        if gradient is None:
            return
        if own.grad is None:
            if name not in self.buffers:
                self.buffers[name] = self._memory(own, own.dtype)
            self._send(gradient, self.buffers[name])
            own.grad = self.buffers[name]
        else:
            self._settle()
            own.grad += gradient.to(own.grad)
        param.grad = None

    def _send(self, gradient: Tensor, target: Tensor) -> None:
        if self.stream is None:
            target.copy_(gradient)
            return
        self.stream.wait_stream(torch.cuda.current_stream(gradient.device))
        with torch.cuda.stream(self.stream):
            target.copy_(gradient, non_blocking=True)
        gradient.record_stream(self.stream)

    def _settle(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()

    def collect(self) -> None:
        """As Placement.collect: they are there already, or on their way."""
        self._settle()

    def clear(self) -> None:
        """As Placement.clear. What a trial run sent must not land later."""
        self._settle()
        for param in self.model.values():
            param.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """As Placement.publish."""
        if self.swap is not None:
            self.swap.rest()
        for name, param in self.model.items():
            own = self.params[name]
            if own.data_ptr() != param.data_ptr():
                param.copy_(own, non_blocking=True)


class Swapped(Placement):
    """Some blocks are at rest on the host and are updated inside the backward pass, where they are then."""

    def __init__(self, swap: TrainedSwap) -> None:
        self.swap = swap

    def wrote(self, params: Sequence[nn.Parameter]) -> None:
        """As Placement.wrote."""
        self.swap.wrote(params)

    def publish(self) -> None:
        """As Placement.publish: from now on masters are read, or were changed."""
        self.swap.rest()


def update_at(trained: Trained, config: RunConfig, swap: TrainedSwap | None, world: World, host: Host) -> Trained:
    """Where the config wants updates: on the device, inside the backward pass for swapped blocks, or on the host."""
    wanted = config.memory.optimizer_offload
    if wanted == "off" and config.distributed.cpu_offload and world.size == 1 and trained.adapters is None:
        wanted = "states"
    if wanted != "off":
        if world.size > 1:
            fix = 'write distributed = { shard = "full", cpu_offload = true } instead'
            raise ConfigError("memory.optimizer_offload works in one process", fix=fix)
        copies = HostCopies(trained.params, host, masters=wanted == "masters", swap=swap)
        return trained.elsewhere(copies.params, copies)
    return trained if swap is None else trained.elsewhere({}, Swapped(swap))
