"""int8 weights: symmetric, one scale an output row. `quant = { type = "int8" }`: a byte a weight, on any card.

`compute = "dynamic"` rounds activations and gradients to int8 too, a scale a token (W8A8), and multiplies integers, exactly.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fluxsmith.config.quant import Compute, QuantConfig
from fluxsmith.errors import ConfigError
from fluxsmith.io.packed import int8_rows
from fluxsmith.models.fused import Base
from fluxsmith.models.linear import Linear
from fluxsmith.quant.base import FrozenProduct, QuantLinear, in_compute_type
from fluxsmith.quant.products import scaled_rows, unpacked
from fluxsmith.quant.rows import IN_INT8, Dynamic, Int8Product, card_has, goes_dynamic, mode_of, whole_rows


class Config(QuantConfig):
    """8-bit integers: about one byte a weight."""

    compute: Compute = "auto"
    """`dynamic` multiplies in int8, activations and gradients rounded token by token; `weight_only` multiplies in their own type; `auto`
    is dynamic on cards of the 30 and 40 series (compute capability 8.x), where that is faster."""

    def mode(self) -> Dynamic:
        """When products are computed in int8."""
        return mode_of(self.compute, card_is_faster=card_has(8, 0, below=9))

    def require(self, device: torch.device) -> str:
        """What will be done there, in words. Raises ConfigError where it cannot be."""
        if device.type == "cuda" and self.compute == "dynamic" and not card_has(7, 5):
            raise ConfigError(
                'quant.compute = "dynamic" needs a card that multiplies in int8 (compute capability 7.5)',
                fix='write quant.compute = "auto" or "weight_only"',
            )
        is_on = self.mode() == "always" or (self.mode() == "card" and device.type == "cuda")
        return "int8 weights, multiplied in int8" if is_on else "int8 weights, multiplied in the activations' type"

    def can_take(self, in_features: int, out_features: int) -> bool:
        """Any size."""
        return True

    def bytes(self, in_features: int, out_features: int) -> int:
        """Memory of one layer's weight."""
        return in_features * out_features + 4 * out_features

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a weight (out, in) fp32."""
        return int8_rows(weight)

    def fitting(self, parts: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """A file's tensors as `make` takes them, or None."""
        return whole_rows(parts)

    def make(self, linear: Linear, parts: Mapping[str, Tensor]) -> QuantLinear:
        """The layer that takes the place of another."""
        made = Int8Linear.made(linear, parts)
        made.mode = self.mode()
        return made


class Int8Linear(QuantLinear):
    """`weight` int8 (out, in), `scale` fp32 (out, 1)."""

    form = "int8"
    scale: Tensor
    mode: Dynamic = "never"

    def dequantize(self) -> Tensor:
        """As Linear.dequantize, fp32."""
        return self.weight.float() * self.scale

    def matmul(self, x: Tensor) -> Tensor:
        """As Linear.matmul; weight-only, the gradient with respect to x is exact for the dequantised weight."""
        x = in_compute_type(x)
        if goes_dynamic(self.mode, x, self.out_features):
            return Int8Product.apply(x.reshape(-1, x.shape[-1]), self.weight, self.scale).view(*x.shape[:-1], -1)
        if x.dtype == torch.float16:  # values up to 127 without their scale could leave its range
            return FrozenProduct.apply(x, _whole, None, self.weight, self.scale)
        return FrozenProduct.apply(x, _values, self.scale, self.weight)

    def frozen(self, x: Tensor, dtype: torch.dtype) -> tuple[Base, tuple[Tensor, ...]]:
        """As Linear.frozen."""
        if goes_dynamic(self.mode, x, self.out_features):
            return IN_INT8, (self.weight, self.scale)
        return WHOLE if dtype == torch.float16 else VALUES, (self.weight, self.scale)


def _values(dtype: torch.dtype, weight: Tensor) -> Tensor:
    return weight.to(dtype)


def _whole(dtype: torch.dtype, weight: Tensor, scale: Tensor) -> Tensor:
    return (weight.float() * scale).to(dtype)


VALUES, WHOLE = scaled_rows(_values), unpacked(_whole)
