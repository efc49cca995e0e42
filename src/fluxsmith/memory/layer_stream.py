"""Layers of an encoder whose weights wait on the host and visit the device one after the other: T5, SigLIP, a language model.

For modules that know nothing of this project: each layer's own call brings its weights. Frozen weights, no gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fluxsmith.memory.masters import Host, own, take_out
from fluxsmith.memory.slots import Copier, Lane, Schedule

SLOTS = 2
FEWEST = 3  # a list of fewer modules is no stack of layers


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of all stacks in a module (its outermost module lists), in order; empty if it has none."""
    stacks = {name: part for name, part in module.named_modules() if isinstance(part, nn.ModuleList) and len(part) >= FEWEST}
    outer = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    return [layer for name in outer for layer in stacks[name]]


class LayerStream:
    """Host masters of some layers. `attach` makes each layer's call bring them in."""

    def __init__(
        self, layers: Sequence[nn.Module], device: torch.device, *, host: Host | None = None, copier: Copier | None = None
    ) -> None:
        host = host or Host(pin=device.type == "cuda")
        self.layers = list(layers)
        masters = [take_out([layer], host) for layer in self.layers]
        self.lane = Lane(masters, device, Schedule(len(masters), SLOTS), copier)
        self.running: nn.Module | None = None

    def attach(self) -> None:
        """From now on the layers' weights are on the device only while each computes."""
        for number, layer in enumerate(self.layers):
            layer.forward = self._streamed(number, layer, layer.forward)

    def _streamed(self, number: int, layer: nn.Module, inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*inputs: Any, **options: Any) -> Any:
            if self.running is layer:  # called again by functional_call, now with its weights
                return inner(*inputs, **options)
            self.running = layer
            try:
                return functional_call(layer, self._weights(number), inputs, options)
            finally:
                self.running = None

        return forward

    @torch.no_grad()
    def _weights(self, number: int) -> dict[str, Tensor]:
        return own(self.lane.bring(number), 0)

    @property
    def host_bytes(self) -> int:
        """Size of all masters."""
        return self.lane.host_bytes

    def drop(self) -> None:
        """Let go of the places on the device until the next use."""
        self.lane.drop()
