"""OFT as sd-scripts' networks.oft_flux: k blocks of output rows are rotated, q, k, v and mlp of fused layers on their own.

`adapter = { type = "oft", rank = 4, constraint = 1e-3 }`: rank is the number of blocks. sd-scripts adapts the attention of the
double blocks (`targets = 'double_blocks\\.\\d+\\.(img|txt)_attn'`) unless enable_all_linear is on (`targets = "all"`).
"""

from collections.abc import Mapping

import torch
from pydantic import PositiveFloat, model_validator
from torch import Tensor, nn

from fluxsmith.adapters.base import AdapterSet
from fluxsmith.adapters.build import build
from fluxsmith.adapters.formats.state import Part
from fluxsmith.adapters.rotation import cayley, less_one, skew, turn
from fluxsmith.adapters.rows import PartModule
from fluxsmith.adapters.targets import Target
from fluxsmith.config.adapter import AdapterConfig
from fluxsmith.errors import ConfigError
from fluxsmith.models.linear import Linear

EPSILON = 1e-8  # sd-scripts'


class Config(AdapterConfig):
    """Rotations of each layer's outputs; `rank` is the number of blocks and must divide the rows of every layer."""

    constraint: PositiveFloat = 1e-3
    """Largest norm of a layer's rotation, per output row (sd-scripts' network_alpha)."""

    @model_validator(mode="after")
    def _has_a_constraint(self) -> "Config":
        if self.alpha is not None or self.alpha_by_pattern:
            raise ValueError("OFT has a constraint instead of alpha: set constraint, drop alpha and alpha_by_pattern")
        return self

    def build(self, models: Mapping[str, nn.Module], *, seed: int = 0, dtype: torch.dtype | None = None) -> AdapterSet:
        """The adapters for the loaded models, attached. Raises ConfigError as `build.build`, and for blocks that do not fit."""
        return build(self, models, self._start, seed=seed, dtype=dtype, split=True)

    def _start(self, target: Target, base: Linear, seed: int) -> Part:
        start, stop = target.rows
        rows, count = stop - start, target.rank
        if rows % count:
            raise ConfigError(f"adapter.rank: {count} blocks do not divide the {rows} rows of {target.name}", fix="use 2, 4 or 8")
        blocks = torch.zeros(count, rows // count, rows // count)
        return Part(target.part, start, stop, "oft", {"blocks": blocks}, self.constraint)


class OftPart(PartModule):
    """Blocks (k, rows / k, rows / k); alpha is the constraint."""

    kind = "oft"
    blocks: Tensor

    def rotations(self) -> Tensor:
        """(k, b, b), float32."""
        skewed = skew(self.blocks)
        norm = torch.linalg.vector_norm(skewed)
        limit = self.alpha * (self.rows[1] - self.rows[0])
        return cayley(skewed * ((norm.clamp(max=limit) + EPSILON) / (norm + EPSILON)))

    def update(self, x: Tensor, y: Tensor, strength: Tensor) -> Tensor:
        """As PartModule.update."""
        return y + (turn(less_one(self.rotations()), y) * strength).to(y.dtype)

    def delta(self, weight: Tensor, strength: float) -> Tensor:
        """As PartModule.delta."""
        return turn(less_one(self.rotations()), weight.T).T * strength


PART = OftPart
