"""How a weight in few bits multiplies inside an adapted layer's one step of autograd (`Base` of models/fused.py).

Unpacked: the weight is brought to the activations' type and multiplied as a plain one. Rows: values without their scales are
multiplied, the scales then multiply the result as it is added. Both are repeated for the gradient: in between only few bits are kept,
which a compiler has to be told (`late`).
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fluxsmith.models.fused import Base, Form, add_plain, back_plain

Unpack = Callable[..., Tensor]


@torch.library.custom_op("fluxsmith::late", mutates_args=())
def _late(stored: Tensor, grad: Tensor) -> Tensor:
    return stored.clone()


@_late.register_fake
def _(stored: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(stored)


def late(stored: Tensor, grad: Tensor) -> Tensor:
    """The stored weight, in a backward pass. A compiler sees that it comes from the gradient: otherwise it takes the weight that the
    forward pass unpacked for the same one, and keeps it in full until then. Compiled, this costs a copy of the few bits.
    """
    return _late(stored, grad) if torch.compiler.is_compiling() else stored


def unpacked(unpack: Unpack) -> Base:
    """For a weight of which `unpack(dtype, *stored)` is (out, in)."""
    return Base(partial(_add_unpacked, unpack), partial(_back_unpacked, unpack))


def _add_unpacked(
    unpack: Unpack, form: Form, begun: Sequence[Tensor], acts: Sequence[Tensor], stored: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    return add_plain(form, begun, acts, (unpack(acts[0].dtype, *stored),))


def _back_unpacked(
    unpack: Unpack, form: Form, given: Sequence[Tensor], begun: Sequence[Tensor | None], stored: Sequence[Tensor]
) -> list[Tensor | None]:
    return back_plain(form, given, begun, (unpack(given[0].dtype, late(stored[0], given[0]), *stored[1:]),))


def scaled_rows(values: Unpack) -> Base:
    """For a weight `values(dtype, stored[0]) * stored[1]`, with a scale (out, 1) an output row."""
    return Base(partial(_add_rows, values), partial(_back_rows, values))


def _add_rows(values: Unpack, form: Form, begun: Sequence[Tensor], acts: Sequence[Tensor], stored: Sequence[Tensor]) -> tuple[Tensor, ...]:
    dtype = acts[0].dtype
    weight, row = values(dtype, stored[0]), stored[1].flatten().to(dtype)
    made = []
    for (top, bottom), first in zip(form.rows, begun, strict=True):
        (a, b), *others = form.columns
        product = acts[0] @ weight[top:bottom, a:b].T
        for (a, b), act in zip(others, acts[1:], strict=True):
            product = torch.addmm(product, act, weight[top:bottom, a:b].T)
        made.append(torch.addcmul(first, product, row[top:bottom]))
    return tuple(made)


def _back_rows(
    values: Unpack, form: Form, given: Sequence[Tensor], begun: Sequence[Tensor | None], stored: Sequence[Tensor]
) -> list[Tensor | None]:
    dtype = given[0].dtype
    row = stored[1].flatten().to(dtype)
    turned = [grad * row[top:bottom] for (top, bottom), grad in zip(form.rows, given, strict=True)]
    return back_plain(form, turned, begun, (values(dtype, late(stored[0], given[0])),))
