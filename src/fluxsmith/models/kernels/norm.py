"""Layer norm, shift and scale of each sample in one pass over memory, and its backward pass; all sums in fp32.

    y = (1 + scale) n + shift,   n = (x - mean(x)) r,   r = 1 / sqrt(var(x) + eps)
    dx = r (h - mean(h) - n mean(h n)),   h = (1 + scale) dy;   dshift = sum over rows of dy;   dscale = sum over rows of dy n

(Ba et al. 2016, Peebles & Xie 2023.) The backward pass computes mean and r again from x, so only x and scale are kept.
"""
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportIndexIssue=false
# (inside kernels the types are those of Triton's compiler)

import torch
import triton  # type: ignore[import-not-found]  # optional, see choice.py
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fluxsmith.models.fused import EPS
from fluxsmith.models.kernels.operands import block_of, checked, launch, parts_of, readable, warps_of

EPSILON = tl.constexpr(EPS)
SIZE = 16  # rows of one program, where sums over rows are wanted: more rows make fewer lines to add up but fewer programs
ROWS = tl.constexpr(SIZE)


@triton.jit
def _normed(x: tl.tensor, width: tl.tensor, inside: tl.tensor) -> tl.tuple:
    """n and r of one row in fp32; n is 0 past the row's end."""
    centred = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)
    rate = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + EPSILON)
    return centred * rate, rate


@triton.jit
def _forward(x: tl.tuple, shift: tl.tuple, scale: tl.tuple, out: tl.tensor, sizes: tl.tuple, block: tl.constexpr) -> None:
    """One program a row: x (tensor, batch stride, row stride), shift and scale (tensor, batch stride), sizes (rows, width)."""
    rows, width = sizes
    row, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < width
    value = tl.load(x[0] + sample * x[1] + row * x[2] + at, mask=inside, other=0.0).to(tl.float32)
    normed, _ = _normed(value, width, inside)
    factor = 1.0 + tl.load(scale[0] + sample * scale[1] + at, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift[0] + sample * shift[1] + at, mask=inside, other=0.0).to(tl.float32)
    made = factor * normed + offset
    tl.store(out + (sample * rows + row) * width + at, made.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _row_back(grad: tl.tensor, normed: tl.tensor, rate: tl.tensor, factor: tl.tensor, width: tl.tensor) -> tl.tensor:
    """dx of one row; everything is 0 past the row's end."""
    inner = factor * grad
    along = tl.sum(inner * normed, axis=0) / width
    return rate * (inner - tl.sum(inner, axis=0) / width - normed * along)


@triton.jit
def _backward(grad: tl.tuple, x: tl.tuple, scale: tl.tuple, out: tl.tensor, sizes: tl.tuple, block: tl.constexpr) -> None:
    """dx only, one program a row; operands as in `_forward`, grad as x."""
    rows, width = sizes
    row, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < width
    value = tl.load(x[0] + sample * x[1] + row * x[2] + at, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(grad[0] + sample * grad[1] + row * grad[2] + at, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 + tl.load(scale[0] + sample * scale[1] + at, mask=inside, other=0.0).to(tl.float32)
    normed, rate = _normed(value, width, inside)
    made = _row_back(given, normed, rate, factor, width)
    tl.store(out + (sample * rows + row) * width + at, made.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_sums(grad: tl.tuple, x: tl.tuple, scale: tl.tuple, made: tl.tuple, sizes: tl.tuple, block: tl.constexpr) -> None:
    """dx, and sums of dy and dy n over ROWS rows for each program: made (dx, fp32 (B, programs, 2, D)), sizes (rows, width).

    Every program owns its line of the sums: no atomics, the same bits each time.
    """
    rows, width = sizes
    first, sample = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < width
    factor = 1.0 + tl.load(scale[0] + sample * scale[1] + at, mask=inside, other=0.0).to(tl.float32)
    shift_sum = tl.zeros((block,), dtype=tl.float32)
    scale_sum = tl.zeros((block,), dtype=tl.float32)
    for step in range(ROWS):  # a constant: the interpreter cannot count to a number that it was given
        row = (first + step).to(tl.int64)
        live = inside & (row < rows)
        value = tl.load(x[0] + sample * x[1] + row * x[2] + at, mask=live, other=0.0).to(tl.float32)
        given = tl.load(grad[0] + sample * grad[1] + row * grad[2] + at, mask=live, other=0.0).to(tl.float32)
        normed, rate = _normed(value, width, live)
        back = _row_back(given, normed, rate, factor, width)
        tl.store(made[0] + (sample * rows + row) * width + at, back.to(made[0].dtype.element_ty), mask=live)
        shift_sum += given
        scale_sum += given * normed
    sums = made[1] + (sample * tl.num_programs(0) + tl.program_id(0)) * 2 * width + at
    tl.store(sums, shift_sum, mask=inside)
    tl.store(sums + width, scale_sum, mask=inside)


@torch.library.custom_op("fluxsmith::modulate", mutates_args=())
def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D), shift and scale (B, 1, D) -> (B, N, D), contiguous, in the type of x."""
    x, shift, scale = readable(x), readable(shift), readable(scale)
    batch, rows, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    operands = (x, x.stride(0), x.stride(1)), (shift, shift.stride(0)), (scale, scale.stride(0))
    launch(_forward, (rows, batch), *operands, out, (rows, width), block_of(width), on=x, warps=warps_of(width))
    return out


@modulate.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("fluxsmith::modulate_backward", mutates_args=())
def modulate_backward(grad: Tensor, x: Tensor, scale: Tensor, with_sums: bool) -> tuple[Tensor, Tensor]:
    """dx (B, N, D) and, `with_sums`, dshift and dscale in fp32 (B, 2, D); else an empty (B, 0, D)."""
    grad, x, scale = readable(grad), readable(x), readable(scale)
    batch, rows, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    operands = (grad, grad.stride(0), grad.stride(1)), (x, x.stride(0), x.stride(1)), (scale, scale.stride(0))
    block, warps = block_of(width), warps_of(width)
    if not with_sums:
        launch(_backward, (rows, batch), *operands, out, (rows, width), block, on=x, warps=warps)
        return out, x.new_empty((batch, 0, width), dtype=torch.float32)
    programs = parts_of(rows, SIZE)
    sums = x.new_empty((batch, programs, 2, width), dtype=torch.float32)
    launch(_backward_sums, (programs, batch), *operands, (out, sums), (rows, width), block, on=x, warps=warps)
    return out, sums.sum(dim=1)


@modulate_backward.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor, with_sums: bool) -> tuple[Tensor, Tensor]:
    sums = x.new_empty((x.shape[0], 2 if with_sums else 0, x.shape[2]), dtype=torch.float32)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), sums


class Modulated(torch.autograd.Function):
    """The two operators as one step; sums over rows are made only where shift or scale want a gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.shift_dtype = shift.dtype  # type: ignore[attr-defined]
        return modulate(x, shift, scale)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        _, wants_shift, wants_scale = ctx.needs_input_grad  # type: ignore[attr-defined]
        made, sums = modulate_backward(grad, x, scale, wants_shift or wants_scale)
        shift_grad = sums[:, 0:1].to(ctx.shift_dtype) if wants_shift else None  # type: ignore[attr-defined]
        return made, shift_grad, sums[:, 1:2].to(scale.dtype) if wants_scale else None


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) layer_norm(x) + shift: (B, N, D) with (B or 1, 1, D). Equals `fused.modulated`.

    Raises TypeError for other types than fp32, bf16 and fp16, ValueError for shapes that do not fit.
    """
    checked(x=x, shift=shift, scale=scale)
    target = (x.shape[0], 1, x.shape[-1])
    for name, given in (("shift", shift), ("scale", scale)):
        if given.shape not in (target, (1, *target[1:])):
            raise ValueError(f"{name} is {tuple(given.shape)}, {target} was expected")
    return Modulated.apply(x, shift.expand(target), scale.expand(target))
