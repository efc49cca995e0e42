"""Diag-OFT (LyCORIS): blocks of output rows rotated, then each row rescaled. `adapter = { type = "diag_oft", rank = 8 }`.

A strength moves the rotation towards the identity; the rescaling acts in full at any strength, as in LyCORIS.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fluxsmith.adapters.base import AdapterSet
from fluxsmith.adapters.build import build
from fluxsmith.adapters.formats.state import Part
from fluxsmith.adapters.lokr import factorization
from fluxsmith.adapters.rotation import cayley, less_one, skew, turn
from fluxsmith.adapters.rows import PartModule
from fluxsmith.adapters.targets import Target
from fluxsmith.config.adapter import RotationConfig
from fluxsmith.models.linear import Linear


class Config(RotationConfig):
    """Rotations of each layer's outputs; `rank` is the largest side of a block or their number, whichever is smaller."""

    def build(self, models: Mapping[str, nn.Module], *, seed: int = 0, dtype: torch.dtype | None = None) -> AdapterSet:
        """The adapters for the loaded models, attached. Raises ConfigError as `build.build`."""
        return build(self, models, self._start, seed=seed, dtype=dtype)

    def _start(self, target: Target, base: Linear, seed: int) -> Part:
        start, stop = target.rows
        side, count = factorization(stop - start, target.rank)
        tensors = {"blocks": torch.zeros(count, side, side)}
        if self.rescale:
            tensors["rescale"] = torch.ones(stop - start, 1)
        return Part(target.part, start, stop, "diag_oft", tensors, self.constraint)


class DiagOftPart(PartModule):
    """Blocks (k, b, b) and rescale (rows, 1); alpha is the constraint, 0 for none."""

    kind = "diag_oft"
    optional = ("bias", "rescale")
    blocks: Tensor
    rescale: Tensor | None

    def rotations(self) -> Tensor:
        """(..., k, b, b), float32."""
        skewed = skew(self.blocks)
        return cayley(constrained(skewed, self.alpha * (self.rows[1] - self.rows[0])))

    def turned(self, y: Tensor, strength: Tensor | float) -> Tensor:
        """Rows (..., rows) after the rotation at some strength."""
        return y + (turn(less_one(self.rotations()), y) * strength).to(y.dtype)

    def update(self, x: Tensor, y: Tensor, strength: Tensor) -> Tensor:
        """As PartModule.update."""
        turned = self.turned(y, strength)
        return turned if self.rescale is None else turned * self.rescale.flatten().to(y.dtype)

    def delta(self, weight: Tensor, strength: float) -> Tensor:
        """As PartModule.delta."""
        turned = self.turned(weight.T, strength).T
        return (turned if self.rescale is None else turned * self.rescale.float()) - weight


def constrained(skewed: Tensor, limit: float) -> Tensor:
    """Q with at most this norm over all blocks; a limit of 0 is none."""
    if limit <= 0:
        return skewed
    norm = torch.linalg.vector_norm(skewed) + 1e-8
    return torch.where(norm > limit, skewed * (limit / norm), skewed)


PART = DiagOftPart
