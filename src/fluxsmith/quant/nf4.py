"""nf4 weights (Dettmers et al. 2023): quantiles of the normal distribution, a largest value for each 64 weights, itself in 8 bits.

`quant = { type = "nf4" }`: 0.516 bytes a weight. bitsandbytes' kernel unpacks where that package is installed; plain PyTorch does
the same elsewhere.
"""

import importlib.util
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxsmith.config.quant import Beside, QuantConfig
from fluxsmith.errors import ConfigError
from fluxsmith.io.forms import NF4_BLOCK, NF4_NESTED
from fluxsmith.io.packed import from_nf4, nf4, nf4_absmax
from fluxsmith.models.fused import PLAIN, Base
from fluxsmith.models.linear import Linear
from fluxsmith.quant.base import FrozenProduct, QuantLinear, in_compute_type
from fluxsmith.quant.products import unpacked

HAS_KERNEL = importlib.util.find_spec("bitsandbytes") is not None
if HAS_KERNEL:
    import bitsandbytes  # noqa: F401  its operators are registered by the import


class Config(QuantConfig):
    """4-bit normal float with double quantisation: about 0.52 bytes a weight."""

    backend: Literal["auto", "bitsandbytes", "torch"] = "auto"
    """What unpacks the weights; `auto` is bitsandbytes on a card where it is installed. The values are the same."""
    modulation: Beside = "int8"
    """Modulation layers, whose outputs scale every token: `int8`, `same` as the others, or `keep` as they are."""

    def require(self, device: torch.device) -> str:
        """What will be done there, in words. Raises ConfigError where it cannot be."""
        if self.backend == "bitsandbytes" and not HAS_KERNEL:
            fix = "pip install 'fluxsmith[optim]' (or pip install bitsandbytes), or write quant.backend = \"torch\""
            raise ConfigError('quant.backend = "bitsandbytes" needs that package', fix=fix)
        unpacks = "bitsandbytes" if self.backend != "torch" and HAS_KERNEL and device.type == "cuda" else "plain PyTorch"
        return f"nf4 weights, unpacked by {'bitsandbytes' if self.backend == 'bitsandbytes' else unpacks} for each product"

    def can_take(self, in_features: int, out_features: int) -> bool:
        """Two weights share a byte."""
        return in_features % 2 == 0

    def bytes(self, in_features: int, out_features: int) -> int:
        """Memory of one layer's weight."""
        blocks = -(-in_features * out_features // NF4_BLOCK)
        return in_features * out_features // 2 + blocks + 4 * -(-blocks // NF4_NESTED) + 4

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a weight (out, in) fp32."""
        return nf4(weight)

    def fitting(self, parts: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """A file's tensors as `make` takes them."""
        return parts

    def make(self, linear: Linear, parts: Mapping[str, Tensor]) -> QuantLinear:
        """The layer that takes the place of another."""
        made = Nf4Linear.made(linear, parts)
        made.backend = self.backend
        return made


class Nf4Linear(QuantLinear):
    """`weight` packed codes (out, in / 2); `absmax` int8 (blocks), `nested` fp32, `offset` fp32 (1)."""

    form = "nf4"
    absmax: Tensor
    nested: Tensor
    offset: Tensor
    backend = "auto"

    def parts(self) -> dict[str, Tensor]:
        """As QuantLinear.parts."""
        return {"": self.weight.detach().view(torch.uint8), "absmax": self.absmax, "nested": self.nested, "offset": self.offset}

    def dequantize(self) -> Tensor:
        """As Linear.dequantize, fp32."""
        return from_nf4(self.weight, nf4_absmax(self.absmax, self.nested, self.offset), torch.float32)

    def unpacker(self, x: Tensor) -> str:
        """Who unpacks the weight for inputs like x."""
        return "kernel" if HAS_KERNEL and (self.backend == "bitsandbytes" or (self.backend == "auto" and x.is_cuda)) else "torch"

    def matmul(self, x: Tensor) -> Tensor:
        """As Linear.matmul."""
        x, unpack = in_compute_type(x), UNPACK[self.unpacker(x)]
        stored = (self.weight, self.absmax, self.nested, self.offset)
        if self.is_recomputed and x.requires_grad:
            return F.linear(x, unpack(x.dtype, *stored))
        return FrozenProduct.apply(x, unpack, None, *stored)

    def frozen(self, x: Tensor, dtype: torch.dtype) -> tuple[Base, tuple[Tensor, ...]]:
        """As Linear.frozen."""
        stored = (self.weight, self.absmax, self.nested, self.offset)
        if self.is_recomputed and x.requires_grad:
            return PLAIN, (UNPACK[self.unpacker(x)](dtype, *stored),)
        return BASES[self.unpacker(x)], stored


def _by_torch(dtype: torch.dtype, packed: Tensor, absmax: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    return from_nf4(packed, nf4_absmax(absmax, nested, offset), dtype)


def _by_kernel(dtype: torch.dtype, packed: Tensor, absmax: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    flat, shape = packed.view(torch.uint8).reshape(-1, 1), [packed.shape[0], packed.shape[1] * 2]
    return torch.ops.bitsandbytes.dequantize_4bit(flat, nf4_absmax(absmax, nested, offset), NF4_BLOCK, "nf4", shape, dtype)


UNPACK = {"torch": _by_torch, "kernel": _by_kernel}
BASES = {name: unpacked(unpack) for name, unpack in UNPACK.items()}
