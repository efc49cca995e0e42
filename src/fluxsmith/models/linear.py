"""The one matrix product of every model (seam 5): a frozen or trained base with a slot for adapters.

`y = matmul(x)`, then every adapter changes `y`, then the bias. Quantised layers override `matmul` and
`dequantize`; adapters never see which kind of base they sit on. Base keys stay `weight` and `bias`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxsmith.models.fused import PLAIN, AddProduct, Base, Form, LoraDelta

Factors = tuple[Tensor, Tensor, Tensor]  # down (rank, in), up (out, rank), scale (0-dim)


class Linear(nn.Linear):
    """nn.Linear with an ordered slot `adapters`; an adapter is called as `adapter(x, y) -> y`."""

    is_lean = True  # False: each adapter after the base product, with every rounding between
    is_recomputed = False  # True: what is kept for the backward pass lives no longer than that of the block it is in

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, device: str | None = None) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device)
        self.adapters = nn.ModuleDict()

    @classmethod
    def adopt(cls, linear: nn.Linear) -> "Linear":
        """A Linear that shares the parameters of a plain one (how transformers' encoders get the slot)."""
        own = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        own.weight = linear.weight
        own.bias = linear.bias
        return own

    def matmul(self, x: Tensor) -> Tensor:
        """x W^T without bias: (..., in) -> (..., out)."""
        return F.linear(x, self.weight)

    def dequantize(self) -> Tensor:
        """The base weight as a plain tensor, (out, in)."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not self.adapters:
            return F.linear(input, self.weight, self.bias)
        factors = self.factors()
        if factors is not None and _fits(factors, input):
            return self._adapted(factors, (input,), (False,), ())[0]
        return self.stepwise(input)

    def frozen(self, x: Tensor, dtype: torch.dtype) -> tuple[Base, tuple[Tensor, ...]]:
        """How the frozen weight multiplies inputs like x in this type, and the tensors it is stored as."""
        return PLAIN, (self.weight.to(dtype),)

    def stepwise(self, input: Tensor) -> Tensor:
        """As forward, each adapter after the base product."""
        y = self.matmul(input)
        for adapter in self.adapters.values():
            y = adapter(input, y)
        return y if self.bias is None else y + self.bias

    def whole(self, inputs: Sequence[Tensor], gelu: Sequence[bool] = (), heights: Sequence[int] = ()) -> tuple[Tensor, ...]:
        """The product of an input in column blocks, in output row blocks, by putting the input together.

        `gelu` says which inputs still lack their activation; `heights` are the rows of each output, all in one without it.
        """
        acts = [F.gelu(x, approximate="tanh") if raw else x for x, raw in zip(inputs, gelu or (False,) * len(inputs), strict=True)]
        joined = acts[0] if len(acts) == 1 else torch.cat(acts, dim=-1)
        y = F.linear(joined, self.weight, self.bias) if not self.adapters else self.stepwise(joined)
        return tuple(y.split(list(heights), dim=-1)) if heights else (y,)

    def blocks(self, inputs: Sequence[Tensor], gelu: Sequence[bool] = (), heights: Sequence[int] = ()) -> tuple[Tensor, ...]:
        """As `whole`, without ever putting inputs or gradients together where the layer is frozen with one additive adapter."""
        factors = self.factors() if self.adapters else None
        if factors is None or not _fits(factors, inputs[0]):
            return self.whole(inputs, gelu, heights) if len(inputs) == 1 or self.adapters else self._added(inputs, gelu)
        return self._adapted(factors, inputs, gelu or (False,) * len(inputs), heights)

    def factors(self) -> "Factors | None":
        """What the adapters add, if that is one pair of factors on a weight of which `frozen` tells; otherwise None."""
        own = type(self)
        if not self.is_lean or len(self.adapters) != 1 or self.weight.requires_grad:
            return None
        if own.matmul is not Linear.matmul and own.frozen is Linear.frozen:
            return None
        (adapter,) = self.adapters.values()
        make = getattr(adapter, "factors", None)  # anything callable may sit in the slot
        return None if make is None else make()

    def _added(self, inputs: Sequence[Tensor], gelu: Sequence[bool]) -> tuple[Tensor, ...]:
        """The products of column blocks added up."""
        if self.weight.requires_grad or type(self).matmul is not Linear.matmul:
            return self.whole(inputs, gelu)
        acts = [F.gelu(x, approximate="tanh") if raw else x for x, raw in zip(inputs, gelu or (False,) * len(inputs), strict=True)]
        y, start = F.linear(acts[0], self.weight[:, : acts[0].shape[-1]], self.bias), acts[0].shape[-1]
        for act in acts[1:]:
            part = self.weight[:, start : start + act.shape[-1]]
            y, start = torch.addmm(y.flatten(0, -2), act.flatten(0, -2), part.T).view(y.shape), start + act.shape[-1]
        return (y,)

    def _adapted(self, factors: "Factors", inputs: Sequence[Tensor], gelu: Sequence[bool], heights: Sequence[int]) -> tuple[Tensor, ...]:
        down, up, scale = factors
        device = inputs[0].device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs[0].dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        flat = [x.to(dtype).reshape(-1, x.shape[-1]) for x in inputs]
        with torch.autocast(device, enabled=False):
            base, stored = self.frozen(flat[0], dtype)
            form = Form.of([x.shape[-1] for x in inputs], heights or (self.out_features,), gelu, base, len(stored))
            made = LoraDelta.apply(form, bias, scale, down.to(dtype), up.to(dtype), *stored, *flat)
            deltas, activated = made[: len(form.rows)], iter(made[len(form.rows) :])
            acts = [next(activated) if raw else x.detach() for x, raw in zip(flat, form.gelu, strict=True)]
            rows = AddProduct.apply(form, *deltas, *stored, *acts)
        return tuple(y.view(*inputs[0].shape[:-1], y.shape[-1]) for y in rows)


def _fits(factors: Factors, x: Tensor) -> bool:
    """Are the factors in the type the product is computed in? Otherwise they are multiplied in their own, apart."""
    return factors[0].dtype == x.dtype or torch.is_autocast_enabled(x.device.type)


def adopt_linears(module: nn.Module) -> None:
    """Replace every plain nn.Linear below `module` by a Linear that shares its parameters; keys do not change."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear) and not isinstance(child, Linear):
            setattr(module, name, Linear.adopt(child))
        else:
            adopt_linears(child)


@torch.no_grad()
def xavier_(linear: nn.Linear, generator: torch.Generator) -> None:
    """Uniform Xavier weight and zero bias, drawn from `generator`."""
    bound = (6 / (linear.in_features + linear.out_features)) ** 0.5
    linear.weight.uniform_(-bound, bound, generator=generator)
    if linear.bias is not None:
        linear.bias.zero_()
