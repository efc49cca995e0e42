"""GLoRA (LyCORIS' form): W + strength * alpha / rank * (W a1 a2 + b1 b2). `adapter = { type = "glora" }`."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxsmith.adapters.base import AdapterSet
from fluxsmith.adapters.build import build
from fluxsmith.adapters.formats.state import Part
from fluxsmith.adapters.init import kaiming
from fluxsmith.adapters.rows import PartModule
from fluxsmith.adapters.targets import Target
from fluxsmith.config.adapter import FactorConfig
from fluxsmith.models.linear import Linear


class Config(FactorConfig):
    """A low-rank change of the layer's input and a low-rank matrix beside it."""

    def build(self, models: Mapping[str, nn.Module], *, seed: int = 0, dtype: torch.dtype | None = None) -> AdapterSet:
        """The adapters for the loaded models, attached. Raises ConfigError as `build.build`."""
        return build(self, models, self._start, seed=seed, dtype=dtype)

    def _start(self, target: Target, base: Linear, seed: int) -> Part:
        (start, stop), rank, width = target.rows, target.rank, base.in_features
        tensors = {
            "a1": kaiming((width, rank), target, seed, "a1"),
            "a2": torch.zeros(rank, width),
            "b1": kaiming((stop - start, rank), target, seed, "b1"),
            "b2": torch.zeros(rank, width),
        }
        return Part(target.part, start, stop, "glora", tensors, self.stored_alpha(target))


class GloraPart(PartModule):
    """a1 (in, rank), a2 (rank, in), b1 (rows, rank), b2 (rank, in)."""

    kind = "glora"
    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor

    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.a2.shape[0]

    def update(self, x: Tensor, y: Tensor, strength: Tensor) -> Tensor:
        """As PartModule.update."""
        own = self.input(x, self.a2)
        turned = F.linear(F.linear(own, self.a2), self.a1).to(x.dtype)
        beside = F.linear(F.linear(own, self.b2), self.b1)
        return y + ((self.base_product(turned) + beside.to(y.dtype)) * (strength * self.scale())).to(y.dtype)

    def delta(self, weight: Tensor, strength: float) -> Tensor:
        """As PartModule.delta."""
        change = weight @ self.a1.float() @ self.a2.float() + self.b1.float() @ self.b2.float()
        return change * (strength * self.scale())


PART = GloraPart
