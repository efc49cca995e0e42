"""Products with 8-bit values and one scale an output row, multiplied in 8 bits: both operands are rounded row by row on the way.

Forward: x is rounded with a scale a row (token); the scales of x and W multiply the result. Gradient of x: it sums over the output
axis, so W's scale is multiplied into the gradient first, then that is rounded with a scale a row. Off the card the same arithmetic
runs in plain PyTorch, so that it is tested everywhere.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fluxsmith.config.quant import Compute
from fluxsmith.io.packed import FP8, LARGEST_FP8, LARGEST_INT8, row_scale
from fluxsmith.models.fused import Base, Form
from fluxsmith.quant.products import late

Dynamic = Literal["never", "card", "always"]
LEAST_ROWS, STEP = 32, 16  # of cuBLAS's 8-bit products: rows of the first operand, and what sizes are multiples of


def card_has(major: int, minor: int, *, below: int = 99) -> bool:
    """Is there a CUDA card of this compute capability or later, and of a major one less than `below`?"""
    if not torch.cuda.is_available():
        return False
    found = torch.cuda.get_device_capability()
    return (major, minor) <= found and found[0] < below


def mode_of(compute: Compute, *, card_is_faster: bool) -> Dynamic:
    """When products are computed in 8 bits."""
    if compute == "auto":
        return "card" if card_is_faster else "never"
    return "always" if compute == "dynamic" else "never"


def goes_dynamic(mode: Dynamic, x: Tensor, out_features: int) -> bool:
    """Is this product computed in 8 bits?"""
    if mode == "never" or (mode == "card" and not x.is_cuda):
        return False
    return not x.is_cuda or (x.shape[-1] % STEP == 0 and out_features % STEP == 0)


def rounded_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) -> e4m3 values and scale (M, 1) fp32."""
    scale = row_scale(x, LARGEST_FP8)
    return (x.float() / scale).clamp(-LARGEST_FP8, LARGEST_FP8).to(FP8), scale


def rounded_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) -> int8 values and scale (M, 1) fp32."""
    scale = row_scale(x, LARGEST_INT8)
    return (x.float() / scale).round().clamp(-LARGEST_INT8, LARGEST_INT8).to(torch.int8), scale


def product_fp8(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    """a (M, K) times b^T (N, K), both e4m3, scales (M, 1) and (1, N) -> (M, N) bf16, summed in fp32."""
    if a.is_cuda:
        return torch.ops.aten._scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=torch.bfloat16)
    return ((a.float() @ b.float().t()) * scale_a * scale_b).bfloat16()


def product_int8(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) times b^T (N, K), both int8 -> (M, N) int32, exact."""
    rows = a.shape[0]
    if a.is_cuda and rows < LEAST_ROWS:
        a = torch.nn.functional.pad(a, (0, 0, 0, LEAST_ROWS - rows))
    return torch.ops.aten._int_mm(a, b.t())[:rows]


class Fp8Product(torch.autograd.Function):
    """x (M, in) W^T (out, in) in e4m3."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        values, row = rounded_fp8(x)
        return product_fp8(values, weight.view(FP8), row, scale.t().contiguous()).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]  # as this function's forward
        weight, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        values, row = rounded_fp8(grad.float() * scale.t())
        turned = late(weight, grad).t().contiguous().view(FP8)  # the card's kernel wants the summed axis last, in both
        return (
            product_fp8(values, turned, row, torch.ones_like(scale[:1]).expand(1, turned.shape[0]).contiguous()).to(grad.dtype),
            None,
            None,
        )


class Int8Product(torch.autograd.Function):
    """x (M, in) W^T (out, in) in int8."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        values, row = rounded_int8(x)
        return (product_int8(values, weight).float() * row * scale.t()).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]  # as this function's forward
        weight, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        values, row = rounded_int8(grad.float() * scale.t())
        return (product_int8(values, late(weight, grad).t().contiguous()).float() * row).to(grad.dtype), None, None


Rounded = Callable[[Tensor], tuple[Tensor, Tensor]]
Added = Callable[..., Tensor]


def plus_fp8(begun: Tensor, values: Tensor, weight: Tensor, row: Tensor, scale: Tensor | None) -> Tensor:
    """begun (M, N) + row (M, 1) * (values (M, K) weight^T (N, K)) * scale (N, 1), both e4m3; None for scales of one."""
    columns = row.new_ones(1, weight.shape[0]) if scale is None else scale.t().contiguous()
    return begun + product_fp8(values, weight.view(FP8), row, columns).to(begun.dtype)


def plus_int8(begun: Tensor, values: Tensor, weight: Tensor, row: Tensor, scale: Tensor | None) -> Tensor:
    """As plus_fp8, both int8."""
    made = product_int8(values, weight) * row  # fp32
    return (begun + made if scale is None else torch.addcmul(begun, made, scale.t())).to(begun.dtype)


def _add(
    rounded: Rounded, plus: Added, form: Form, begun: Sequence[Tensor], acts: Sequence[Tensor], stored: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """As Base.add. Column blocks are put together: the card's kernels want whole rows."""
    values, row = rounded(acts[0] if len(acts) == 1 else torch.cat(list(acts), dim=-1))
    weight, scale = stored
    return tuple(plus(first, values, weight[a:b], row, scale[a:b]) for (a, b), first in zip(form.rows, begun, strict=True))


def _back(
    rounded: Rounded, plus: Added, form: Form, given: Sequence[Tensor], begun: Sequence[Tensor | None], stored: Sequence[Tensor]
) -> list[Tensor | None]:
    """As Base.back."""
    (weight, scale), dtype = stored, given[0].dtype
    whole = torch.zeros((), dtype=dtype, device=weight.device)
    for (a, b), grad in zip(form.rows, given, strict=True):
        values, row = rounded(grad * scale[a:b].t())  # fp32
        whole = plus(whole, values, late(weight[a:b], grad).t().contiguous(), row, None)  # the summed axis last, in both
    return [None if first is None else first + whole[:, a:b] for (a, b), first in zip(form.columns, begun, strict=True)]


def in_8_bits(rounded: Rounded, plus: Added) -> Base:
    """For a weight of 8-bit values and a scale (out, 1) an output row."""
    return Base(partial(_add, rounded, plus), partial(_back, rounded, plus))


IN_FP8, IN_INT8 = in_8_bits(rounded_fp8, plus_fp8), in_8_bits(rounded_int8, plus_int8)


def whole_rows(parts: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """A file's scale for the tensor or its rows as (out, 1) fp32; None where it has one for parts of a row."""
    values, scale = parts[""], parts["scale"].float()
    if scale.dim() > 2 or scale.numel() not in (1, values.shape[0]):
        return None
    return {"": values, "scale": scale.reshape(-1, 1).expand(values.shape[0], 1).contiguous()}
