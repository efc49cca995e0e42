"""Quantised layers (seam 5): subclasses of Linear that override `matmul` and `dequantize`; adapters never notice.

`quantise_linears(block, Fp8Linear.of)` replaces every Linear inside a block.
"""

from collections.abc import Callable

from torch import Tensor, nn

from fluxsmith.models.linear import Linear


class QuantLinear(Linear):
    """A frozen weight in few bits. `weight` holds the stored form; what adapters merge into is `dequantize()`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self.matmul(input)
        for adapter in self.adapters.values():
            y = adapter(input, y)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def quantise_linears(module: nn.Module, make: Callable[[Linear], QuantLinear]) -> int:
    """Replace the Linears below a module one by one; returns how many. Existing adapters move along."""
    count = 0
    for owner in [*module.modules()]:
        if isinstance(owner, Linear | nn.ModuleDict):
            continue
        for name, child in [*owner.named_children()]:
            if isinstance(child, Linear) and not isinstance(child, QuantLinear):
                made = make(child)
                made.adapters = child.adapters
                setattr(owner, name, made)
                count += 1
    return count
