"""int2 weights: four in a byte, about 0.31 bytes a weight, with a scale and an offset for each 64 of a row's inputs.

`quant = { type = "int2" }`. Own packing in plain PyTorch (docs/reference/model-files.md); modulation stays in 8 bits unless asked for.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fluxsmith.config.quant import Beside, QuantConfig
from fluxsmith.io.packed import grouped
from fluxsmith.models.linear import Linear
from fluxsmith.quant.base import QuantLinear
from fluxsmith.quant.groups import Int2Linear, group_bytes, group_of

BITS = 2


class Config(QuantConfig):
    """2-bit integers in groups: four in a byte, about 0.31 bytes a weight."""

    group: Literal[32, 64, 128] = 64
    """Inputs that share a scale and an offset; fewer where that does not divide a layer's inputs."""
    symmetric: bool = False
    """The same range on both sides of zero, instead of a group's own."""
    modulation: Beside = "int8"
    """Modulation layers, whose outputs scale every token: `int8`, `same` as the others, or `keep` as they are."""

    def require(self, device: torch.device) -> str:
        """What will be done there, in words."""
        return "int2 weights in groups, unpacked to the activations' type for each product"

    def can_take(self, in_features: int, out_features: int) -> bool:
        """Does a layer divide into groups? Others are kept in int8."""
        return group_of(in_features, self.group) > 0

    def bytes(self, in_features: int, out_features: int) -> int:
        """Memory of one layer's weight."""
        return group_bytes(in_features, out_features, bits=BITS, group=self.group)

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a weight (out, in) fp32."""
        return grouped(weight, BITS, group_of(weight.shape[1], self.group), symmetric=self.symmetric)

    def fitting(self, parts: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """A file's tensors as `make` takes them."""
        return parts

    def make(self, linear: Linear, parts: Mapping[str, Tensor]) -> QuantLinear:
        """The layer that takes the place of another."""
        return Int2Linear.made(linear, parts)
