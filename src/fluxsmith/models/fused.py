"""Steps of a block as single autograd functions: fewer passes over memory, and only what the backward pass cannot compute again is kept.

Each equals its plain form in `ops.py` up to the order of roundings. Weights of norms and projections may be frozen or trained.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

EPS = 1e-6  # of the RMS norm


def gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate * y in one pass: x, y (B, N, D), gate (B, 1, D)."""
    return torch.addcmul(x, gate, y) if gate.requires_grad else GatedAdd.apply(x, gate, y)


class GatedAdd(torch.autograd.Function):
    """With a constant gate nothing but the gate is kept, and not as a saved tensor: so that recomputation can stop before this step."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        ctx.gate = gate  # type: ignore[attr-defined]  # (B, 1, D), a constant
        return torch.addcmul(x, gate, y)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, Tensor]:  # type: ignore[override]  # as this function's forward
        return grad, None, grad * ctx.gate  # type: ignore[attr-defined]


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) * layer_norm(x) + shift: (B, N, D) with (B, 1, D). For one sample they are the norm's own weight and bias."""
    width = (x.shape[-1],)
    if x.shape[0] == 1:
        return F.layer_norm(x, width, (1 + scale).view(-1), shift.view(-1), eps=EPS)
    return torch.addcmul(shift, 1 + scale, F.layer_norm(x, width, eps=EPS))


class NormRotate(torch.autograd.Function):
    """qkv (B, N, 3*H*D) -> q and k normed per head in fp32 and turned, v as it is: three of (B, H, N, D).

    `scales` (N or 1, 2, 1, D) of the RMS norms of q and k, row by row; `pe` (B, 1, N, D/2, 2). Keeps its input and one number a head.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, qkv: Tensor, scales: Tensor, pe: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv.unflatten(-1, (3, num_heads, -1))
        x = heads[:, :, :2].float()  # (B, N, 2, H, D)
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = inverse.square_().div_(x.shape[-1]).add_(EPS).rsqrt_()  # (B, N, 2, H, 1)
        y = (x * inverse).mul_(scales)
        turned = _rotated(y, pe).to(qkv.dtype)
        ctx.save_for_backward(qkv, scales, pe, inverse)
        ctx.num_heads = num_heads  # type: ignore[attr-defined]
        return turned[:, :, 0].transpose(1, 2), turned[:, :, 1].transpose(1, 2), heads[:, :, 2].transpose(1, 2)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # type: ignore[override]
        qkv, scales, pe, inverse = ctx.saved_tensors  # type: ignore[attr-defined]
        x = qkv.unflatten(-1, (3, ctx.num_heads, -1))[:, :, :2].float()  # type: ignore[attr-defined]
        grad = torch.stack((grad_q.transpose(1, 2), grad_k.transpose(1, 2)), dim=2).float()  # (B, N, 2, H, D)
        back = _rotated(grad, pe, back=True)
        grad_scales = None
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            grad_scales = (back * x * inverse).sum_to_size(scales.shape).to(scales.dtype)
        back = back.mul_(scales)
        along = (back * x).sum(dim=-1, keepdim=True)
        along = along.mul_(inverse).mul_(inverse).div_(-x.shape[-1])
        made = torch.addcmul(back, x, along).mul_(inverse)
        whole = torch.cat((made.flatten(2).to(qkv.dtype), grad_v.transpose(1, 2).flatten(2)), dim=-1)
        return whole, grad_scales, None, None


def _rotated(x: Tensor, pe: Tensor, *, back: bool = False) -> Tensor:
    """Pairs of channels (B, N, 2, H, D) turned by the angles of pe, or back."""
    pairs = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # inductor makes no code for complex numbers
        cos, sin = pe[:, 0, :, None, None].unbind(-1)
        one, other = pairs.unbind(-1)
        sin = -sin if back else sin
        return torch.stack((one * cos - other * sin, one * sin + other * cos), dim=-1).flatten(-2)
    turn = _turn(pe)
    return torch.view_as_real(torch.view_as_complex(pairs) * (turn.conj() if back else turn)).flatten(-2)


def _turn(pe: Tensor) -> Tensor:
    """(B, 1, N, D/2, 2) -> complex (B, N, 1, 1, D/2)."""
    return torch.view_as_complex(pe.contiguous())[:, 0, :, None, None]


def row_scales(parts: Sequence[tuple[int, Tensor, Tensor]]) -> Tensor:
    """Scales of q's and k's norms for rows of several streams: (rows, q, k) each -> (sum of rows, 2, 1, D), or (1, 2, 1, D) for one."""
    stacked = [(rows, torch.stack((q, k))[None, :, None]) for rows, q, k in parts]
    if len(stacked) == 1:
        return stacked[0][1].float()
    return torch.cat([scales.expand(rows, -1, -1, -1) for rows, scales in stacked]).float()


class Base(NamedTuple):
    """How a frozen weight multiplies, from the tensors it is stored as; plain weights and weights in few bits differ in nothing else."""

    add: Callable[..., tuple[Tensor, ...]]
    """form, what each output row block begins with, input column blocks, stored tensors -> row blocks + x W^T."""
    back: Callable[..., list[Tensor | None]]
    """form, gradients of the row blocks, what the gradient of each column block begins with (None: nobody wants it), stored tensors."""


class Form(NamedTuple):
    """Column blocks of the input, row blocks of the output, which inputs still lack their GELU, and how the base is stored."""

    columns: tuple[tuple[int, int], ...]
    """(first, last + 1) of each input block."""
    rows: tuple[tuple[int, int], ...]
    """(first, last + 1) of each output block."""
    gelu: tuple[bool, ...]
    """True for inputs that are pre-activations."""
    base: Base
    stored: int
    """Number of tensors the base is stored as."""

    @classmethod
    def of(cls, widths: Sequence[int], heights: Sequence[int], gelu: Sequence[bool], base: Base, stored: int) -> "Form":
        """From the sizes of the blocks."""
        return cls(_spans(widths), _spans(heights), tuple(gelu), base, stored)


class LoraDelta(torch.autograd.Function):
    """bias + scale (x A^T) B^T, and in the backward pass the gradient of that *and* of the frozen base product that is added to it.

    The base product itself (`AddProduct`) keeps nothing; so recomputation of a block can stop before its last and largest product.
    The input comes in column blocks, of which some still lack their GELU; the output goes in row blocks. Nothing is ever put together.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, form: Form, bias: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`tensors`: scale (0-dim), down (rank, in), up (out, rank), what the base is stored as, then the input blocks (rows, width)."""
        scale, down, up, *rest = tensors
        stored, parts = rest[: form.stored], rest[form.stored :]
        acts = [_act(part, is_raw) for part, is_raw in zip(parts, form.gelu, strict=True)]
        hidden = _product(acts, [down[:, a:b] for a, b in form.columns])
        hidden = hidden.mul_(scale)
        deltas = []
        for a, b in form.rows:
            own = up[a:b]
            deltas.append(hidden @ own.T if bias is None else torch.addmm(bias[a:b], hidden, own.T))
        needs_input = any(ctx.needs_input_grad[5 + form.stored :])  # type: ignore[attr-defined]
        kept = stored if needs_input else [None] * form.stored
        ctx.save_for_backward(scale, down, up, hidden, *kept, *parts)  # type: ignore[arg-type]  # None is allowed
        ctx.form = form  # type: ignore[attr-defined]
        made = tuple(act for act, is_raw in zip(acts, form.gelu, strict=True) if is_raw)
        ctx.mark_non_differentiable(*made)
        return (*deltas, *made)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # as this function's forward
        form: Form = ctx.form  # type: ignore[attr-defined]
        scale, down, up, hidden, *rest = ctx.saved_tensors  # type: ignore[attr-defined]
        stored, parts = rest[: form.stored], rest[form.stored :]
        wanted = ctx.needs_input_grad  # type: ignore[attr-defined]
        given = grads[: len(form.rows)]
        inner = _product(given, [up[a:b].T for a, b in form.rows]).mul_(scale)  # gradient of x A^T
        grad_down = _joined([inner.T @ _act(part, is_raw) for part, is_raw in zip(parts, form.gelu, strict=True)], 1)
        grad_up = _joined([grad.T @ hidden for grad in given])
        grad_bias = _joined([grad.sum(dim=0) for grad in given]) if wanted[1] else None
        needs = wanted[5 + form.stored :]
        begun = [inner @ down[:, a:b] if is_wanted else None for (a, b), is_wanted in zip(form.columns, needs, strict=True)]
        made = form.base.back(form, given, begun, stored) if any(needs) else begun
        turned = [_back_through_gelu(grad, part, is_raw) for grad, part, is_raw in zip(made, parts, form.gelu, strict=True)]
        return (None, grad_bias, None, grad_down, grad_up, *[None] * form.stored, *turned)


class AddProduct(torch.autograd.Function):
    """delta + x W^T for each row block; the gradient of the product is `LoraDelta`'s affair."""

    @staticmethod
    def forward(ctx: FunctionCtx, form: Form, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`tensors`: what each row block begins with, what the base is stored as, input blocks."""
        first, last = len(form.rows), len(form.rows) + form.stored
        return form.base.add(form, tensors[:first], tensors[last:], tensors[first:last])

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # as this function's forward
        return (None, *grads, *[None] * (len(ctx.needs_input_grad) - 1 - len(grads)))  # type: ignore[attr-defined]


def add_plain(form: Form, begun: Sequence[Tensor], acts: Sequence[Tensor], stored: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """As Base.add for a weight (out, in) in the type of the product."""
    made = []
    for (top, bottom), first in zip(form.rows, begun, strict=True):
        total = first
        for (a, b), act in zip(form.columns, acts, strict=True):
            total = torch.addmm(total, act, stored[0][top:bottom, a:b].T)
        made.append(total)
    return tuple(made)


def back_plain(form: Form, given: Sequence[Tensor], begun: Sequence[Tensor | None], stored: Sequence[Tensor]) -> list[Tensor | None]:
    """As Base.back for a weight (out, in) in the type of the product."""
    made: list[Tensor | None] = []
    for (a, b), first in zip(form.columns, begun, strict=True):
        total = first
        for (top, bottom), own in zip(form.rows, given, strict=True):
            total = None if total is None else torch.addmm(total, own, stored[0][top:bottom, a:b])
        made.append(total)
    return made


PLAIN = Base(add_plain, back_plain)


def _back_through_gelu(grad: Tensor | None, part: Tensor, is_raw: bool) -> Tensor | None:
    return torch.ops.aten.gelu_backward(grad, part, approximate="tanh") if is_raw and grad is not None else grad


def _spans(sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    spans, start = [], 0
    for size in sizes:
        spans.append((start, start + size))
        start += size
    return tuple(spans)


def _act(part: Tensor, is_raw: bool) -> Tensor:
    return F.gelu(part, approximate="tanh") if is_raw else part


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def _product(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    """Sum of left_i @ right_i^T."""
    made = lefts[0] @ rights[0].T
    for left, right in zip(lefts[1:], rights[1:], strict=True):
        made = torch.addmm(made, left, right.T)
    return made
