"""(IA)3 (Liu et al. 2022): each output, or input, of a layer times 1 + strength * weight. `adapter = { type = "ia3" }`."""

from collections.abc import Mapping

import torch
from pydantic import model_validator
from torch import Tensor, nn

from fluxsmith.adapters.base import AdapterSet
from fluxsmith.adapters.build import build
from fluxsmith.adapters.formats.state import Part
from fluxsmith.adapters.rows import PartModule
from fluxsmith.adapters.targets import Target
from fluxsmith.config.adapter import AdapterConfig
from fluxsmith.models.linear import Linear


class Config(AdapterConfig):
    """One factor for each output or input of each layer; rank 0 by type or pattern leaves a layer alone."""

    on_input: bool = False
    """Factors on the inputs instead of the outputs."""

    @model_validator(mode="after")
    def _has_no_strength(self) -> "Config":
        if self.alpha is not None or self.alpha_by_pattern:
            raise ValueError("(IA)3 has no alpha: drop alpha and alpha_by_pattern")
        return self

    def build(self, models: Mapping[str, nn.Module], *, seed: int = 0, dtype: torch.dtype | None = None) -> AdapterSet:
        """The adapters for the loaded models, attached. Raises ConfigError as `build.build`."""
        return build(self, models, self._start, seed=seed, dtype=dtype)

    def _start(self, target: Target, base: Linear, seed: int) -> Part:
        start, stop = target.rows
        weight = torch.zeros(base.in_features if self.on_input else stop - start)
        return Part(target.part, start, stop, "ia3", {"weight": weight, "on_input": torch.tensor(int(self.on_input))}, 1.0)


class Ia3Part(PartModule):
    """The factors less 1."""

    kind = "ia3"
    weight: Tensor

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        self.acts_on_input = bool(part.tensors["on_input"].item())

    def update(self, x: Tensor, y: Tensor, strength: Tensor) -> Tensor:
        """As PartModule.update."""
        factor = self.weight * strength
        if self.acts_on_input:
            return y + self.base_product(x * factor.to(x.dtype))
        return y + y * factor.to(y.dtype)

    def delta(self, weight: Tensor, strength: float) -> Tensor:
        """As PartModule.delta."""
        factor = self.weight.float() * strength
        return weight * (factor if self.acts_on_input else factor[:, None])


PART = Ia3Part
