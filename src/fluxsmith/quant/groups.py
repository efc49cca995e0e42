"""Layers of 4 or 2 bits with a scale and an offset for each group of inputs; what int4 and int2 share.

Memory only: the weight is unpacked for each product, and again for the gradient.
"""

from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxsmith.io.packed import from_groups
from fluxsmith.models.fused import PLAIN, Base
from fluxsmith.quant.base import FrozenProduct, QuantLinear, in_compute_type
from fluxsmith.quant.products import unpacked


def group_of(in_features: int, wanted: int) -> int:
    """Inputs of one group: as many as wanted, or what divides the layer's inputs; 0 where no group of at least 16 does."""
    found = in_features if in_features <= wanted else gcd(in_features, wanted)
    return found if found >= 16 and found % 4 == 0 else 0


def group_bytes(in_features: int, out_features: int, *, bits: int, group: int) -> int:
    """Memory of one layer's weight."""
    return out_features * in_features * bits // 8 + 4 * out_features * (in_features // max(1, group_of(in_features, group)))


class GroupedLinear(QuantLinear):
    """`weight` packed codes (out, in * bits / 8), `scale` and `offset` bf16 (out, groups)."""

    bits = 0
    scale: Tensor
    offset: Tensor

    def parts(self) -> dict[str, Tensor]:
        """As QuantLinear.parts."""
        return {"": self.weight.detach().view(torch.uint8), "scale": self.scale, "offset": self.offset}

    def dequantize(self) -> Tensor:
        """As Linear.dequantize, fp32."""
        return from_groups(self.weight, self.scale, self.offset, self.bits, torch.float32)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in a type."""
        return UNPACK[self.bits](dtype, self.weight, self.scale, self.offset)

    def matmul(self, x: Tensor) -> Tensor:
        """As Linear.matmul."""
        x = in_compute_type(x)
        if self.is_recomputed and x.requires_grad:
            return F.linear(x, self.unpacked(x.dtype))
        return FrozenProduct.apply(x, UNPACK[self.bits], None, self.weight, self.scale, self.offset)

    def frozen(self, x: Tensor, dtype: torch.dtype) -> tuple[Base, tuple[Tensor, ...]]:
        """As Linear.frozen."""
        if self.is_recomputed and x.requires_grad:
            return PLAIN, (self.unpacked(dtype),)
        return BASES[self.bits], (self.weight, self.scale, self.offset)


class Int4Linear(GroupedLinear):
    """Two weights a byte."""

    form, bits = "int4", 4


class Int2Linear(GroupedLinear):
    """Four weights a byte."""

    form, bits = "int2", 2


def _four(dtype: torch.dtype, packed: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return from_groups(packed, scale, offset, 4, dtype)


def _two(dtype: torch.dtype, packed: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return from_groups(packed, scale, offset, 2, dtype)


UNPACK = {4: _four, 2: _two}
BASES = {bits: unpacked(unpack) for bits, unpack in UNPACK.items()}
