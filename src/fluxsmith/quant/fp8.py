"""fp8 weights: e4m3 with one scale an output row, multiplied in the activations' type. `quant = { type = "fp8" }`.

A row's scale is its largest weight / 448, so that no weight is clipped and small ones keep three bits of mantissa (a plain cast, as
sd-scripts makes it, flushes weights below 2^-9 to zero).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxsmith.config.section import PluginConfig
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.linear import Linear
from fluxsmith.quant.base import QuantLinear, quantise_linears

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of float8_e4m3fn


class Config(PluginConfig):
    """8-bit floating point."""

    scale: Literal["row", "none"] = "row"
    """One scale for each output row, or a plain cast."""

    text_encoders: bool = False
    """The text encoders too."""

    def apply(self, role: str, module: nn.Module) -> None:
        """Quantise a part in place: the transformer's blocks (its embedders and last layer stay), or a text encoder if asked."""
        rows = self.scale == "row"
        parts = module.blocks if isinstance(module, FluxDiT) else [module] if self.text_encoders and role in ("clip_l", "t5xxl") else []
        for part in parts:
            quantise_linears(part, lambda linear: Fp8Linear.of(linear, rows=rows))


class Fp8Linear(QuantLinear):
    """`weight` the bits of float8_e4m3fn as int8 (out, in), `scale` fp32 (out, 1).

    As int8, because transformers' T5 casts what it feeds a layer to the type of its weight, unless that is int8.
    """

    scale: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, linear: Linear, *, rows: bool = True) -> "Fp8Linear":
        """The quantised form of a layer; its weight can be let go."""
        made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=1e-12) if rows else weight.new_ones(weight.shape[0], 1)
        made.weight = nn.Parameter((weight / scale).clamp(-LARGEST, LARGEST).to(FP8).view(torch.int8), requires_grad=False)
        made.bias = linear.bias
        made.register_buffer("scale", scale, persistent=False)
        return made

    def dequantize(self) -> Tensor:
        """As Linear.dequantize, fp32."""
        return self.weight.view(FP8).float() * self.scale

    def matmul(self, x: Tensor) -> Tensor:
        """As Linear.matmul; the gradient with respect to x is exact for the dequantised weight."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return F.linear(x.to(dtype), self.weight.view(FP8).to(dtype)) * self.scale.flatten().to(dtype)
