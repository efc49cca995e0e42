"""The steps between matrix products, in two tables: LEAN for speed, REFERENCE with every rounding of the original implementation.

A transformer block calls `self.ops.modulate(...)`; `use(dit, REFERENCE)` changes all blocks of a model.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxsmith.models import fused
from fluxsmith.models.attention import attention, rotate, split_heads
from fluxsmith.models.linear import Linear

Heads = tuple[Tensor, Tensor, Tensor]
Norm = tuple[int, Tensor, Tensor]  # rows, scales of q and k (D,)


class Ops(NamedTuple):
    """One way to compute everything but attention and the plain products."""

    modulate: Callable[[Tensor, Tensor, Tensor], Tensor]
    """x (B, N, D), shift, scale (B, 1, D) -> (1 + scale) layer_norm(x) + shift."""
    gate: Callable[[Tensor, Tensor, Tensor], Tensor]
    """x, gate (B, 1, D), y -> x + gate y."""
    heads: Callable[[Tensor, Sequence[Norm], Tensor, int], Heads]
    """qkv (B, N, 3*H*D), norms of its row blocks, rotary table, H -> q, k, v (B, H, N, D)."""
    attend: Callable[..., Tensor]
    """q, k, v (B, H, N, D), mask -> (B, N, H*D); see `backends.py`."""
    linear: Callable[..., tuple[Tensor, ...]]
    """layer, inputs as column blocks, gelu flags, heights of output row blocks -> output blocks; see `Linear.blocks`."""


def plain_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As Ops.modulate, step by step."""
    return (1 + scale) * F.layer_norm(x, (x.shape[-1],), eps=fused.EPS) + shift


def plain_gate(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """As Ops.gate, step by step."""
    return x + gate * y


def plain_heads(qkv: Tensor, norms: Sequence[Norm], pe: Tensor, num_heads: int) -> Heads:
    """As Ops.heads, step by step."""
    q, k, v = split_heads(qkv, num_heads)
    sizes = [rows for rows, _, _ in norms]
    turned = []
    for x, scales in ((q, [own for _, own, _ in norms]), (k, [own for _, _, own in norms])):
        normed = [rms_norm(part, scale) for part, scale in zip(x.split(sizes, dim=2), scales, strict=True)]
        turned.append(rotate(torch.cat(normed, dim=2), pe))
    return turned[0], turned[1], v


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """x / rms(x) * scale over the last axis, in fp32 (Zhang & Sennrich 2019)."""
    return F.rms_norm(x.float(), (x.shape[-1],), eps=fused.EPS).type_as(x) * scale.type_as(x)


def lean_heads(qkv: Tensor, norms: Sequence[Norm], pe: Tensor, num_heads: int) -> Heads:
    """As Ops.heads, in one autograd function."""
    return fused.NormRotate.apply(qkv, fused.row_scales(norms), pe, num_heads)


def plain_linear(layer: Linear, inputs: Sequence[Tensor], gelu: Sequence[bool] = (), heights: Sequence[int] = ()) -> tuple[Tensor, ...]:
    """As Ops.linear, with everything put together."""
    return layer.whole(inputs, gelu, heights)


def lean_linear(layer: Linear, inputs: Sequence[Tensor], gelu: Sequence[bool] = (), heights: Sequence[int] = ()) -> tuple[Tensor, ...]:
    """As Ops.linear, block by block."""
    return layer.blocks(inputs, gelu, heights)


LEAN = Ops(fused.modulated, fused.gated, lean_heads, attention, lean_linear)
REFERENCE = Ops(plain_modulate, plain_gate, plain_heads, attention, plain_linear)


def use(model: nn.Module, ops: Ops) -> None:
    """Let every block of a model compute in this way."""
    for module in model.modules():
        if isinstance(getattr(module, "ops", None), Ops):
            module.ops = ops  # type: ignore[assignment]  # a plain attribute
        if isinstance(module, Linear):
            module.is_lean = ops.linear is lean_linear


def use_attention(model: nn.Module, attend: Callable[..., Tensor]) -> None:
    """Let every block of a model attend in this way."""
    for module in model.modules():
        found = getattr(module, "ops", None)
        if isinstance(found, Ops):
            module.ops = found._replace(attend=attend)  # type: ignore[assignment]  # a plain attribute
