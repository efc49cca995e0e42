"""What every adapter file format is read into and written from: layer paths with their factors, in one naming.

Layer paths are those of `adapters/targets.py`; a fused layer holds one whole part or parts q, k, v (mlp) with factors of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fluxsmith.errors import ModelFileError


class Part(NamedTuple):
    """The adapter of output rows start..stop of a layer. `name` is empty for a whole layer; strength is alpha / rank."""

    name: str
    start: int
    stop: int
    down: Tensor  # (rank, in)
    up: Tensor  # (stop - start, rank)
    alpha: float

    @property
    def rank(self) -> int:
        """Width."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """Strength that the product of the factors is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class LayerState:
    """One layer's adapter. `out_features` is None where a file does not tell (parts of a fused layer are missing)."""

    parts: tuple[Part, ...]
    out_features: int | None
    kind: str = "lora"

    @property
    def in_features(self) -> int:
        """Inputs of the layer."""
        return self.parts[0].down.shape[1]

    @property
    def rank(self) -> int:
        """Largest rank of its parts."""
        return max(part.rank for part in self.parts)

    def delta(self) -> Tensor:
        """What is added to the weight at strength 1: (out, in), float32. Raises ModelFileError if the height is unknown."""
        made = torch.zeros(self.height(), self.in_features)
        for part in self.parts:
            made[part.start : part.stop] += part.scale * (part.up.float() @ part.down.float())
        return made

    def height(self) -> int:
        """Output rows of the layer; raises ModelFileError where the file does not tell."""
        if self.out_features is None:
            raise ModelFileError("the layer's size cannot be told from this file", fix="give the base model too")
        return self.out_features


@dataclass(frozen=True)
class AdapterState:
    """An adapter file's content."""

    layers: Mapping[str, LayerState]
    metadata: Mapping[str, str] = field(default_factory=dict)
    format: str = ""
    """Format it was read from."""

    def roles(self) -> tuple[str, ...]:
        """Models it adapts: dit, clip_l, t5xxl."""
        return tuple(dict.fromkeys(path.split(".", 1)[0] for path in self.layers))


def fuse(layer: LayerState) -> Part:
    """One pair of factors for the whole layer with exactly the same product: downs stacked, ups block-diagonal.

    The alpha is chosen so that alpha / (sum of ranks) is the common strength; differing strengths go into the up factor.
    """
    if len(layer.parts) == 1 and not layer.parts[0].name:
        return layer.parts[0]
    total = sum(part.rank for part in layer.parts)
    scales = {part.scale for part in layer.parts}
    common = scales.pop() if len(scales) == 1 else None
    up = layer.parts[0].up.new_zeros(layer.height(), total)
    column = 0
    for part in layer.parts:
        up[part.start : part.stop, column : column + part.rank] = part.up if common is not None else part.up * part.scale
        column += part.rank
    down = torch.cat([part.down for part in layer.parts])
    return Part("", 0, layer.height(), down, up, total * (1.0 if common is None else common))


def unsplit(layer: LayerState, names: tuple[str, ...]) -> LayerState:
    """Parts that share one down factor (as converted fused layers do) become one whole part again, without loss."""
    parts = layer.parts
    if tuple(part.name for part in parts) != names or any(not torch.equal(part.down, parts[0].down) for part in parts):
        return layer
    first = parts[0]
    up = torch.cat([part.up if part.scale == first.scale else part.up * (part.scale / first.scale) for part in parts])
    return LayerState((Part("", 0, up.shape[0], first.down, up, first.alpha),), up.shape[0], layer.kind)
