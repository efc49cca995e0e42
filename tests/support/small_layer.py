"""One adapter on one small layer, in float64, for the tests of the kinds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxsmith.adapters.formats.state import Part
from fluxsmith.adapters.load import part_module
from fluxsmith.adapters.rows import LayerAdapter
from fluxsmith.models.linear import Linear

INPUTS, OUTPUTS = 12, 36


def whole(kind: str, alpha: float = 1.0, rule: str = "", **tensors: Tensor) -> Part:
    """A part of all rows."""
    return Part("", 0, OUTPUTS, kind, tensors, alpha, rule)


def random(*shape: int, std: float = 1.0) -> Tensor:
    """Float64 values."""
    return torch.randn(*shape, dtype=torch.float64) * std


def layer(parts: Part | Sequence[Part], strength: float = 1.0) -> tuple[Linear, LayerAdapter, Tensor]:
    """A layer with the adapter on it, the adapter, and an input (2, 5, in)."""
    base = Linear(INPUTS, OUTPUTS).double().eval()
    base.weight.data, base.bias.data = random(OUTPUTS, INPUTS), random(OUTPUTS)
    adapter = LayerAdapter([part_module(part) for part in ([parts] if isinstance(parts, Part) else parts)], OUTPUTS)
    adapter.bind(base)
    adapter.eval().strength.fill_(strength)
    base.adapters["x"] = adapter
    return base, adapter, random(2, 5, INPUTS)


def changed(base: Linear, x: Tensor) -> Tensor:
    """Output without the bias."""
    return base(x) - base.bias


def follows_its_delta(base: Linear, adapter: LayerAdapter, x: Tensor, tolerance: float = 1e-4) -> bool:
    """Does merging give the forward?"""
    merged = x @ (base.weight + adapter.delta(base.weight).double()).T + base.bias
    bias = adapter.bias_delta()
    return bool((merged + (0 if bias is None else bias.double()) - base(x)).abs().max() < tolerance)
