"""fp8 weights: e4m3 with one scale an output row. `quant = { type = "fp8" }`: a byte a weight.

A row's scale is its largest weight / 448, so that no weight is clipped and small ones keep three bits of mantissa (a plain cast, as
sd-scripts makes it, flushes weights below 2^-9 to zero). Cards that multiply in fp8 (Ada and later) do so; elsewhere the weight is
brought to the activations' type for the product.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fluxsmith.config.quant import Compute, QuantConfig
from fluxsmith.errors import ConfigError
from fluxsmith.io.packed import FP8, fp8_rows
from fluxsmith.models.fused import Base
from fluxsmith.models.linear import Linear
from fluxsmith.quant.base import FrozenProduct, QuantLinear, in_compute_type
from fluxsmith.quant.products import scaled_rows, unpacked
from fluxsmith.quant.rows import IN_FP8, Dynamic, Fp8Product, card_has, goes_dynamic, mode_of, whole_rows


class Config(QuantConfig):
    """8-bit floating point: about one byte a weight."""

    scale: Literal["row", "none"] = "row"
    """One scale for each output row, or a plain cast."""
    compute: Compute = "auto"
    """`dynamic` multiplies in fp8, activations and gradients rounded row by row; `weight_only` multiplies in their own type; `auto` is
    dynamic where the card can."""

    def mode(self) -> Dynamic:
        """When products are computed in fp8."""
        return mode_of(self.compute, card_is_faster=card_has(8, 9))

    def require(self, device: torch.device) -> str:
        """What will be done there, in words. Raises ConfigError where it cannot be."""
        if device.type == "cuda" and self.compute == "dynamic" and not card_has(8, 9):
            raise ConfigError(
                'quant.compute = "dynamic" needs a card that multiplies in fp8 (compute capability 8.9)',
                fix='write quant.compute = "auto" or "weight_only", or quant.type = "int8"',
            )
        is_on = self.mode() == "always" or (self.mode() == "card" and device.type == "cuda")
        return "fp8 weights, multiplied in fp8" if is_on else "fp8 weights, multiplied in the activations' type"

    def can_take(self, in_features: int, out_features: int) -> bool:
        """Any size."""
        return True

    def bytes(self, in_features: int, out_features: int) -> int:
        """Memory of one layer's weight."""
        return in_features * out_features + 4 * out_features

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a weight (out, in) fp32."""
        return fp8_rows(weight, rows=self.scale == "row")

    def fitting(self, parts: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """A file's tensors as `make` takes them, or None."""
        return whole_rows(parts)

    def make(self, linear: Linear, parts: Mapping[str, Tensor]) -> QuantLinear:
        """The layer that takes the place of another."""
        made = Fp8Linear.made(linear, parts)
        made.mode = self.mode()
        return made


class Fp8Linear(QuantLinear):
    """`weight` the bits of float8_e4m3fn as int8 (out, in), `scale` fp32 (out, 1)."""

    form = "fp8"
    scale: Tensor
    mode: Dynamic = "never"

    @classmethod
    @torch.no_grad()
    def of(cls, linear: Linear, *, rows: bool = True) -> "Fp8Linear":
        """The quantised form of a layer; its weight can be let go."""
        return cls.made(linear, fp8_rows(linear.weight.detach().float(), rows=rows))

    def parts(self) -> dict[str, Tensor]:
        """As QuantLinear.parts."""
        return {"": self.weight.detach().view(FP8), "scale": self.scale}

    def dequantize(self) -> Tensor:
        """As Linear.dequantize, fp32."""
        return self.weight.view(FP8).float() * self.scale

    def matmul(self, x: Tensor) -> Tensor:
        """As Linear.matmul; weight-only, the gradient with respect to x is exact for the dequantised weight."""
        x = in_compute_type(x)
        if goes_dynamic(self.mode, x, self.out_features):
            return Fp8Product.apply(x.reshape(-1, x.shape[-1]), self.weight, self.scale).view(*x.shape[:-1], -1)
        if x.dtype == torch.float16:  # values up to 448 without their scale would leave its range
            return FrozenProduct.apply(x, _whole, None, self.weight, self.scale)
        return FrozenProduct.apply(x, _values, self.scale, self.weight)

    def frozen(self, x: Tensor, dtype: torch.dtype) -> tuple[Base, tuple[Tensor, ...]]:
        """As Linear.frozen."""
        if goes_dynamic(self.mode, x, self.out_features):
            return IN_FP8, (self.weight, self.scale)
        return WHOLE if dtype == torch.float16 else VALUES, (self.weight, self.scale)


def _values(dtype: torch.dtype, weight: Tensor) -> Tensor:
    return weight.view(FP8).to(dtype)


def _whole(dtype: torch.dtype, weight: Tensor, scale: Tensor) -> Tensor:
    return (weight.view(FP8).float() * scale).to(dtype)


VALUES, WHOLE = scaled_rows(_values), unpacked(_whole)
