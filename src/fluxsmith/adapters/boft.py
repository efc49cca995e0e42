"""BOFT (Liu et al. 2024, LyCORIS' form): a butterfly of rotations over the output rows. `adapter = { type = "boft", rank = 8 }`.

Stage i mixes rows that are 2^i half blocks apart; a strength moves every stage, not the product, towards the identity.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fluxsmith.adapters.base import AdapterSet
from fluxsmith.adapters.build import build
from fluxsmith.adapters.diag_oft import DiagOftPart, constrained
from fluxsmith.adapters.formats.state import Part
from fluxsmith.adapters.rotation import cayley, less_one, skew
from fluxsmith.adapters.targets import Target
from fluxsmith.config.adapter import RotationConfig
from fluxsmith.errors import ConfigError
from fluxsmith.models.linear import Linear


class Config(RotationConfig):
    """Butterfly rotations of each layer's outputs; `rank` is the largest side of a block."""

    def build(self, models: Mapping[str, nn.Module], *, seed: int = 0, dtype: torch.dtype | None = None) -> AdapterSet:
        """The adapters for the loaded models, attached. Raises ConfigError as `build.build`."""
        return build(self, models, self._start, seed=seed, dtype=dtype)

    def _start(self, target: Target, base: Linear, seed: int) -> Part:
        start, stop = target.rows
        side, count = butterfly(stop - start, target.rank, target.name)
        stages = bin(count - 1).count("1") + 1
        tensors = {"blocks": torch.zeros(stages, count, side, side)}
        if self.rescale:
            tensors["rescale"] = torch.ones(stop - start, 1)
        return Part(target.part, start, stop, "boft", tensors, self.constraint)


def butterfly(rows: int, limit: int, name: str) -> tuple[int, int]:
    """Side and number of blocks: the number is the smallest power of two that leaves even sides up to the limit."""
    count = 1
    while rows // count > limit or (rows // count) % 2:
        count *= 2
        if rows % count or rows // count < 2:
            fix = "use another rank, or leave the layer out with adapter.exclude"
            raise ConfigError(f"adapter.rank: the {rows} rows of {name} do not split into even blocks of up to {limit}", fix=fix)
    return rows // count, count


class BoftPart(DiagOftPart):
    """Blocks (stages, k, b, b)."""

    kind = "boft"

    def turned(self, y: Tensor, strength: Tensor | float) -> Tensor:
        """Rows (..., rows) after all stages at some strength."""
        skewed = constrained(skew(self.blocks), self.alpha * (self.rows[1] - self.rows[0]))
        rotations = (less_one(cayley(skewed)) * strength).to(y.dtype)
        half = rotations.shape[-1] // 2
        for stage, turns in enumerate(rotations):
            apart = 2**stage * half
            mixed = y.unflatten(-1, (-1, 2, apart)).transpose(-1, -2).flatten(-3).unflatten(-1, (-1, 2 * half))
            mixed = mixed + torch.einsum("kij,...kj->...ki", turns, mixed)
            y = mixed.flatten(-2).unflatten(-1, (-1, apart, 2)).transpose(-1, -2).flatten(-3)
        return y


PART = BoftPart
