"""RMS norm of queries and keys and the rotation of their channel pairs in one pass over memory, and its backward pass.

    n = x r,   r = 1 / sqrt(mean(x^2) + eps),   y = n scale,   (a, b) -> (a cos - b sin, a sin + b cos) for each pair of y
    z = dy turned back,   dx = r (z scale - n mean(z scale n)),   dscale = sum of z n

(Zhang & Sennrich 2019, Su et al. 2021.) Inside all is fp32; qkv is read where it lies and only qkv is kept.
"""
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportIndexIssue=false
# (inside kernels the types are those of Triton's compiler)

from collections.abc import Sequence

import torch
import triton  # type: ignore[import-not-found]  # optional, see choice.py
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fluxsmith.models.fused import EPS, row_scales
from fluxsmith.models.kernels.operands import block_of, checked, launch, parts_of, readable, warps_of

EPSILON = tl.constexpr(EPS)
HEADS = 8  # of one program


@triton.jit
def _turned(y: tl.tensor, cos: tl.tensor, sin: tl.tensor, heads: tl.constexpr, block: tl.constexpr) -> tl.tensor:
    """Channel pairs of y (heads, block) turned by cos, sin (block / 2)."""
    even, odd = tl.split(tl.reshape(y, (heads, block // 2, 2)))
    cos, sin = cos[None, :], sin[None, :]
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (heads, block))


@triton.jit
def _forward(qkv: tl.tuple, scales: tl.tuple, pe: tl.tuple, out: tl.tensor, sizes: tl.tuple, blocks: tl.constexpr) -> None:
    """One program a token and eight heads: qkv (tensor, batch stride, row stride), scales (tensor, row stride), pe (tensor, batch stride),
    out (2, B, N, H, D), sizes (batch, rows, heads, width).
    """
    batch, rows, heads, width = sizes
    row, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = tl.program_id(2) * blocks[0] + tl.arange(0, blocks[0])
    at = tl.arange(0, blocks[1])
    place = head[:, None] * width + at[None, :]
    inside = (head < heads)[:, None] & (at < width)[None, :]
    table = tl.load(pe[0] + sample * pe[1] + row * width + at, mask=at < width, other=0.0)
    cos, sin = tl.split(tl.reshape(table, (blocks[1] // 2, 2)))
    for which in tl.static_range(2):
        source = qkv[0] + sample * qkv[1] + row * qkv[2] + which * heads * width
        x = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales[0] + row * scales[1] + which * width + at, mask=at < width, other=0.0)
        rate = tl.rsqrt(tl.sum(x * x, axis=1) / width + EPSILON)
        made = _turned(x * rate[:, None] * scale[None, :], cos, sin, blocks[0], blocks[1])
        target = out + ((which * batch + sample) * rows + row) * heads * width
        tl.store(target + place, made.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grads: tl.tuple, qkv: tl.tuple, factors: tl.tuple, made: tl.tuple, sizes: tl.tuple, blocks: tl.constexpr) -> None:
    """Writes all of dqkv, dv included: grads three of (tensor, batch, head, row stride), factors (scales, row stride, pe, batch stride),
    made (dqkv, sums). With blocks[2], sums (B, N, head blocks, 2, D) in fp32 get each program's own part of dscale.
    """
    _, rows, heads, width = sizes
    row, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = tl.program_id(2) * blocks[0] + tl.arange(0, blocks[0])
    at = tl.arange(0, blocks[1])
    place = head[:, None] * width + at[None, :]
    inside = (head < heads)[:, None] & (at < width)[None, :]
    table = tl.load(factors[2] + sample * factors[3] + row * width + at, mask=at < width, other=0.0)
    cos, sin = tl.split(tl.reshape(table, (blocks[1] // 2, 2)))
    target = made[0] + (sample * rows + row) * 3 * heads * width
    for which in tl.static_range(3):
        grad = grads[which]
        lines = grad[0] + sample * grad[1] + row * grad[3]
        given = tl.load(lines + head[:, None] * grad[2] + at[None, :], mask=inside, other=0.0)
        if which < 2:
            x = tl.load(qkv[0] + sample * qkv[1] + row * qkv[2] + which * heads * width + place, mask=inside, other=0.0).to(tl.float32)
            rate = tl.rsqrt(tl.sum(x * x, axis=1) / width + EPSILON)[:, None]
            scale = tl.load(factors[0] + row * factors[1] + which * width + at, mask=at < width, other=0.0)
            back = _turned(given.to(tl.float32), cos, -sin, blocks[0], blocks[1])
            if blocks[2]:
                line = (sample * rows + row) * tl.num_programs(2) + tl.program_id(2)
                tl.store(made[1] + (line * 2 + which) * width + at, tl.sum(back * x * rate, axis=0), mask=at < width)
            back = back * scale[None, :]
            along = tl.sum(back * x, axis=1)[:, None] * rate * rate / width
            given = (rate * (back - x * along)).to(made[0].dtype.element_ty)
        tl.store(target + which * heads * width + place, given.to(made[0].dtype.element_ty), mask=inside)


def _blocks(heads: int, width: int) -> tuple[int, int]:
    """Heads and channels of one program."""
    return min(HEADS, block_of(heads)), block_of(width)


@torch.library.custom_op("fluxsmith::norm_rotate", mutates_args=())
def norm_rotate(qkv: Tensor, scales: Tensor, pe: Tensor, num_heads: int) -> Tensor:
    """qkv (B, N, 3*H*D), scales (N or 1, 2, 1, D) fp32, pe (B or 1, 1, N, D/2, 2) fp32 -> q and k as (2, B, N, H, D)."""
    qkv, scales, pe = readable(qkv), scales.contiguous(), pe.contiguous()
    batch, rows, width = qkv.shape[0], qkv.shape[1], scales.shape[-1]
    out = torch.empty((2, batch, rows, num_heads, width), dtype=qkv.dtype, device=qkv.device)
    blocks = _blocks(num_heads, width)
    grid = (rows, batch, parts_of(num_heads, blocks[0]))
    operands = (qkv, qkv.stride(0), qkv.stride(1)), (scales, _step(scales)), (pe, _step(pe))
    warps = warps_of(blocks[0] * blocks[1])
    launch(_forward, grid, *operands, out, (batch, rows, num_heads, width), blocks, on=qkv, warps=warps)
    return out


@norm_rotate.register_fake
def _(qkv: Tensor, scales: Tensor, pe: Tensor, num_heads: int) -> Tensor:
    return qkv.new_empty((2, qkv.shape[0], qkv.shape[1], num_heads, scales.shape[-1]))


@torch.library.custom_op("fluxsmith::norm_rotate_backward", mutates_args=())
def norm_rotate_backward(grads: Sequence[Tensor], qkv: Tensor, scales: Tensor, pe: Tensor, with_sums: bool) -> tuple[Tensor, Tensor]:
    """Gradients of q, k, v (B, H, N, D) -> that of qkv and, `with_sums`, of the scales (N, 2, 1, D) in fp32; else an empty one."""
    grads, qkv = [readable(grad) for grad in grads], readable(qkv)
    scales, pe = scales.contiguous(), pe.contiguous()
    batch, heads, rows, width = grads[0].shape
    out = torch.empty((batch, rows, 3 * heads * width), dtype=qkv.dtype, device=qkv.device)
    blocks = _blocks(heads, width)
    grid = (rows, batch, parts_of(heads, blocks[0]))
    sums = qkv.new_empty((batch, rows, grid[2], 2, width) if with_sums else (0,), dtype=torch.float32)
    given = tuple((grad, grad.stride(0), grad.stride(1), grad.stride(2)) for grad in grads)
    operands = given, (qkv, qkv.stride(0), qkv.stride(1)), (scales, _step(scales), pe, _step(pe))
    warps = warps_of(blocks[0] * blocks[1])
    launch(_backward, grid, *operands, (out, sums), (batch, rows, heads, width), (*blocks, with_sums), on=qkv, warps=warps)
    return out, sums.sum(dim=(0, 2))[:, :, None] if with_sums else sums


@norm_rotate_backward.register_fake
def _(grads: Sequence[Tensor], qkv: Tensor, scales: Tensor, pe: Tensor, with_sums: bool) -> tuple[Tensor, Tensor]:
    shape = (qkv.shape[1], 2, 1, scales.shape[-1]) if with_sums else (0,)
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device), qkv.new_empty(shape, dtype=torch.float32)


def _step(tensor: Tensor) -> int:
    """Elements from one entry of the first axis to the next, 0 where there is one for all."""
    return 0 if tensor.shape[0] == 1 else tensor.stride(0)


class NormRotate(torch.autograd.Function):
    """The two operators as one step; v goes through as a view, and its gradient into the same write as those of q and k."""

    @staticmethod
    def forward(ctx: FunctionCtx, qkv: Tensor, scales: Tensor, pe: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(qkv, scales, pe)
        q, k = norm_rotate(qkv, scales, pe, num_heads).transpose(2, 3).unbind(0)
        return q, k, qkv.unflatten(-1, (3, num_heads, -1))[:, :, 2].transpose(1, 2)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # type: ignore[override]
        qkv, scales, pe = ctx.saved_tensors  # type: ignore[attr-defined]
        with_sums = ctx.needs_input_grad[1]  # type: ignore[attr-defined]
        made, sums = norm_rotate_backward([grad_q, grad_k, grad_v], qkv, scales, pe, with_sums)
        return made, sums.sum_to_size(scales.shape) if with_sums else None, None, None


def turned_heads(qkv: Tensor, norms: Sequence[tuple[int, Tensor, Tensor]], pe: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, N, 3*H*D), norms of its row blocks, pe (B or 1, 1, N, D/2, 2), H -> q, k, v (B, H, N, D). Equals `ops.lean_heads`.

    In memory q and k are (B, N, H, D), so that what attention returns needs no copy. Raises TypeError as `norm.modulated`.
    """
    checked(qkv=qkv)
    return NormRotate.apply(qkv, row_scales(norms), pe.float(), num_heads)
