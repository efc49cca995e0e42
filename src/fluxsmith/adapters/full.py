"""Full difference: a whole matrix beside each layer (LyCORIS' `diff`, and `diff_b` for the bias). `adapter = { type = "full" }`."""

from collections.abc import Mapping

import torch
from pydantic import model_validator
from torch import Tensor, nn

from fluxsmith.adapters.additive import Additive
from fluxsmith.adapters.base import AdapterSet
from fluxsmith.adapters.build import build
from fluxsmith.adapters.formats.state import Part
from fluxsmith.adapters.targets import Target
from fluxsmith.config.adapter import AdapterConfig
from fluxsmith.models.linear import Linear


class Config(AdapterConfig):
    """The whole difference of each layer, without low rank; rank 0 by type or pattern leaves a layer alone."""

    bias: bool = True
    """The difference of the bias too, where the layer has one."""

    @model_validator(mode="after")
    def _has_no_strength(self) -> "Config":
        if self.alpha is not None or self.alpha_by_pattern:
            raise ValueError("a full difference has no alpha: drop alpha and alpha_by_pattern")
        return self

    def build(self, models: Mapping[str, nn.Module], *, seed: int = 0, dtype: torch.dtype | None = None) -> AdapterSet:
        """The adapters for the loaded models, attached. Raises ConfigError as `build.build`."""
        return build(self, models, self._start, seed=seed, dtype=dtype)

    def _start(self, target: Target, base: Linear, seed: int) -> Part:
        start, stop = target.rows
        tensors = {"diff": torch.zeros(stop - start, base.in_features)}
        if self.bias and base.bias is not None:
            tensors["bias"] = torch.zeros(stop - start)
        return Part(target.part, start, stop, "full", tensors, 1.0)


class FullPart(Additive):
    """The difference itself."""

    kind = "full"
    diff: Tensor

    def matrix(self) -> Tensor:
        """As Additive.matrix."""
        return self.diff


PART = FullPart
