"""Where trained values live: by default they are the model's own tensors; else shares of them, or copies on the host.

Optimizer, average and states see `Trained.params`. A placement carries gradients to these and new values back to the model.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Span(NamedTuple):
    """The rows of a tensor that one process has."""

    start: int
    stop: int
    shape: tuple[int, ...]
    """Of the whole tensor."""


class Placement:
    """The model's own tensors are trained: nothing has to be carried."""

    is_shared = False
    """True if the model computes only where all processes do: they draw and validate together."""
    spans: Mapping[str, Span] = {}
    """Which trained tensors are shares of a whole: with any, all processes save and export together."""

    def clear(self) -> None:
        """Forget the gradients of the model's tensors."""

    def collect(self) -> None:
        """The gradients of a whole step are there: hand them to the trained tensors."""

    def publish(self) -> None:
        """The trained tensors have new values: the model computes with them from now on."""

    def wrote(self, params: Sequence[nn.Parameter]) -> None:
        """These tensors were updated inside the backward pass."""

    def norm(self, params: Mapping[str, nn.Parameter]) -> Tensor:
        """Norm over all gradients of the run, 0-dim."""
        return torch.nn.utils.get_total_norm([param.grad for param in params.values() if param.grad is not None])

    def whole(self, name: str, value: Tensor) -> Tensor:
        """The whole of which `value` (a trained tensor, or its average) is this process's share; all processes must ask."""
        return value
