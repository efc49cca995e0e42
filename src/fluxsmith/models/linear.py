"""The one matrix product of every model (seam 5): a frozen or trained base with a slot for adapters.

`y = matmul(x)`, then every adapter changes `y`, then the bias. Quantised layers override `matmul` and
`dequantize`; adapters never see which kind of base they sit on. Base keys stay `weight` and `bias`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """nn.Linear with an ordered slot `adapters`; an adapter is called as `adapter(x, y) -> y`."""

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
        y = self.matmul(input)
        for adapter in self.adapters.values():
            y = adapter(input, y)
        return y if self.bias is None else y + self.bias


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
