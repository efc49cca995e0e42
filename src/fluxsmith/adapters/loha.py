"""LoHa (LyCORIS): y + strength * alpha / rank * ((w1_a w1_b) * (w2_a w2_b)) x, elementwise product. `adapter = { type = "loha" }`."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fluxsmith.adapters.additive import Additive, with_magnitude
from fluxsmith.adapters.base import AdapterSet
from fluxsmith.adapters.build import build
from fluxsmith.adapters.formats.state import Part
from fluxsmith.adapters.init import normal
from fluxsmith.adapters.targets import Target
from fluxsmith.config.adapter import DecomposedConfig
from fluxsmith.models.linear import Linear


class Config(DecomposedConfig):
    """Hadamard products of two low-rank matrices beside each layer."""

    def build(self, models: Mapping[str, nn.Module], *, seed: int = 0, dtype: torch.dtype | None = None) -> AdapterSet:
        """The adapters for the loaded models, attached. Raises ConfigError as `build.build`."""
        return build(self, models, self._start, seed=seed, dtype=dtype)

    def _start(self, target: Target, base: Linear, seed: int) -> Part:
        """Normal factors (deviation 1, w1_a 0.1), w2_a zero, as LyCORIS."""
        (start, stop), rank = target.rows, target.rank
        tensors = {
            "w1_a": normal((stop - start, rank), 0.1, target, seed, "w1_a"),
            "w1_b": normal((rank, base.in_features), 1.0, target, seed, "w1_b"),
            "w2_a": torch.zeros(stop - start, rank),
            "w2_b": normal((rank, base.in_features), 1.0, target, seed, "w2_b"),
        }
        part = Part(target.part, start, stop, "loha", tensors, self.stored_alpha(target))
        return with_magnitude(part, base.dequantize()[start:stop], self.norm_per, "interpolated") if self.weight_decompose else part


class LohaPart(Additive):
    """Two pairs of factors."""

    kind = "loha"
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor

    def carrier(self) -> str | None:
        """As PartModule.carrier."""
        return "w1_a"

    def matrix(self) -> Tensor:
        """As Additive.matrix."""
        return (self.w1_a @ self.w1_b) * (self.w2_a @ self.w2_b) * (self.alpha / self.w1_b.shape[0])


PART = LohaPart
