"""LoKr (LyCORIS): y + strength * (w1 kron w2) x, the second factor as a product of low rank. `adapter = { type = "lokr", factor = 8 }`.

With both factors whole there is no rank, and the strength is 1 whatever alpha says; so do LyCORIS and every loader.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from fluxsmith.adapters.additive import Additive, with_magnitude
from fluxsmith.adapters.base import AdapterSet
from fluxsmith.adapters.build import build
from fluxsmith.adapters.formats.state import Part
from fluxsmith.adapters.init import kaiming
from fluxsmith.adapters.targets import Target
from fluxsmith.config.adapter import DecomposedConfig
from fluxsmith.models.linear import Linear


class Config(DecomposedConfig):
    """Kronecker products beside each layer."""

    factor: int = -1
    """Largest side of the first factor; -1 makes both factors as square as the layer allows."""
    decompose_both: bool = False
    """The first factor as a product of low rank too."""
    full_matrix: bool = False
    """No low rank at all: both factors whole; rank and alpha then have no effect."""
    unbalanced: bool = False
    """The larger share of the output rows goes to the first factor (LyCORIS' unbalanced_factorization)."""

    @model_validator(mode="after")
    def _factor_is_possible(self) -> "Config":
        if self.factor == 0 or self.factor < -1:
            raise ValueError("factor is -1 or a positive number")
        if self.full_matrix and self.decompose_both:
            raise ValueError("full_matrix leaves no factor for decompose_both: drop one")
        return self

    def build(self, models: Mapping[str, nn.Module], *, seed: int = 0, dtype: torch.dtype | None = None) -> AdapterSet:
        """The adapters for the loaded models, attached. Raises ConfigError as `build.build`."""
        return build(self, models, self._start, seed=seed, dtype=dtype)

    def _start(self, target: Target, base: Linear, seed: int) -> Part:
        """w1 uniform, the last factor of w2 zero, as LyCORIS."""
        start, stop = target.rows
        rank = target.rank
        (left, right), (inner, outer) = factorization(stop - start, self.factor), factorization(base.in_features, self.factor)
        if self.unbalanced:
            left, right = right, left
        tensors: dict[str, Tensor] = {}
        if self.decompose_both and rank < max(left, inner) / 2:
            tensors |= {"w1_a": kaiming((left, rank), target, seed, "w1_a"), "w1_b": kaiming((rank, inner), target, seed, "w1_b")}
        else:
            tensors["w1"] = kaiming((left, inner), target, seed, "w1")
        if rank < max(right, outer) / 2 and not self.full_matrix:
            tensors |= {"w2_a": kaiming((right, rank), target, seed, "w2_a"), "w2_b": torch.zeros(rank, outer)}
        else:
            tensors["w2"] = torch.zeros(right, outer)
        part = Part(target.part, start, stop, "lokr", tensors, float(rank))
        if part.rank:
            part = part.having(alpha=self.stored_alpha(target))
        return with_magnitude(part, base.dequantize()[start:stop], self.norm_per, "interpolated") if self.weight_decompose else part


def factorization(size: int, factor: int) -> tuple[int, int]:
    """A size as smaller x larger: with the factor where it divides, else as square as divisors up to the factor allow."""
    if factor > 0 and size % factor == 0:
        small, large = sorted((factor, size // factor))
        return small, large
    limit = size if factor < 0 else factor
    best = max(side for side in range(1, int(size**0.5) + 1) if size % side == 0 and side <= max(limit, 1))
    return best, size // best


class LokrPart(Additive):
    """w1 or w1_a, w1_b; w2 or w2_a, w2_b."""

    kind = "lokr"
    optional = ("bias", "magnitude", "w1", "w2")
    w1: Tensor | None
    w1_a: Tensor
    w1_b: Tensor
    w2: Tensor | None
    w2_a: Tensor
    w2_b: Tensor

    def scale(self) -> float:
        """alpha / rank; 1 without low rank."""
        rank = self.w2_b.shape[0] if self.w2 is None else self.w1_b.shape[0] if self.w1 is None else 0
        return self.alpha / rank if rank else 1.0

    def carrier(self) -> str | None:
        """As PartModule.carrier."""
        return None if self.w1 is not None and self.w2 is not None else "w1" if self.w1 is not None else "w1_a"

    def _left(self) -> Tensor:
        return self.w1_a @ self.w1_b if self.w1 is None else self.w1

    def matrix(self) -> Tensor:
        """As Additive.matrix."""
        right = self.w2_a @ self.w2_b if self.w2 is None else self.w2
        return torch.kron(self._left(), right) * self.scale()

    def product(self, x: Tensor, strength: Tensor) -> Tensor:
        """As Additive.product, without the whole matrix: w2 on the inner axis, w1 over the outer."""
        left = self._left()
        hidden = self.input(x, left).unflatten(-1, (left.shape[1], -1))  # (..., outer, inner)
        hidden = F.linear(F.linear(hidden, self.w2_b), self.w2_a) if self.w2 is None else F.linear(hidden, self.w2)
        hidden = hidden * (strength * self.scale())
        return torch.matmul(left, hidden).flatten(-2)


PART = LokrPart
