"""What every adapter file format is read into and written from: layer paths with their tensors, in one naming.

Layer paths are those of `adapters/targets.py`; a fused layer holds one whole part or parts q, k, v (mlp) of their own.
A part's `kind` names the file `adapters/<kind>.py` that knows its maths; `formats/kinds.py` knows its tensors and sizes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fluxsmith.errors import ModelFileError


@dataclass(frozen=True, eq=False)
class Part:
    """The adapter of output rows start..stop of a layer. `name` is empty for a whole layer.

    `tensors` are named as in `formats/kinds.py`; any kind may have `bias` (rows,), and the additive ones `magnitude` (DoRA).
    """

    name: str
    start: int
    stop: int
    kind: str
    tensors: Mapping[str, Tensor]
    alpha: float
    """Strength is alpha / rank where a kind has a rank; the constraint of orthogonal kinds."""
    rule: str = ""
    """How a DoRA follows the strength: `lycoris`, `peft` or `interpolated`."""

    @property
    def down(self) -> Tensor:
        """LoRA's (rank, in)."""
        return self.tensors["down"]

    @property
    def up(self) -> Tensor:
        """LoRA's (rows, rank)."""
        return self.tensors["up"]

    @property
    def rows(self) -> int:
        """Output rows."""
        return self.stop - self.start

    @property
    def rank(self) -> int:
        """Width; 0 for kinds without one."""
        if self.kind == "lora":
            return self.down.shape[0]
        for name in ("w2_b", "w1_b", "a2"):
            if name in self.tensors:
                return self.tensors[name].shape[0]
        return 0

    @property
    def scale(self) -> float:
        """Strength that the product of the factors is multiplied by."""
        return self.alpha / self.rank if self.rank else 1.0

    @property
    def is_plain_lora(self) -> bool:
        """A pair of factors and nothing else."""
        return self.kind == "lora" and set(self.tensors) == {"down", "up"}

    def having(self, **changes: Any) -> "Part":
        """A copy with some fields replaced."""
        return replace(self, **changes)


def lora_part(name: str, start: int, stop: int, down: Tensor, up: Tensor, alpha: float) -> Part:
    """A LoRA's part: down (rank, in), up (stop - start, rank), strength alpha / rank."""
    return Part(name, start, stop, "lora", {"down": down, "up": up}, alpha)


@dataclass(frozen=True)
class LayerState:
    """One layer's adapter. `out_features`, `in_features` are None where a file does not tell (missing parts; rotations)."""

    parts: tuple[Part, ...]
    out_features: int | None
    in_features: int | None = None

    def __post_init__(self) -> None:
        if self.in_features is None and self.parts and "down" in self.parts[0].tensors:
            object.__setattr__(self, "in_features", self.parts[0].down.shape[1])

    @property
    def kind(self) -> str:
        """Kind of its parts, joined by `+` if they differ; DoRA counts as a kind of its own."""
        return "+".join(dict.fromkeys("dora" if "magnitude" in part.tensors else part.kind for part in self.parts))

    @property
    def rank(self) -> int:
        """Largest rank of its parts."""
        return max(part.rank for part in self.parts)

    def delta(self) -> Tensor:
        """What a LoRA adds to the weight at strength 1: (out, in), float32. Raises ModelFileError if the height is unknown.

        Other kinds may need the weight that they change: `adapters.load.delta_of(path, layer, weight)`.
        """
        if not all(part.is_plain_lora or set(part.tensors) == {"down", "up", "bias"} for part in self.parts):
            raise ModelFileError(f"what a {self.kind} adds cannot be told without the base weight")
        made = torch.zeros(self.height(), self.parts[0].down.shape[1])
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
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    """Whole parameters that it puts in place of the model's, at any strength: `dit.single_blocks.0.norm.key_norm.scale`."""

    def roles(self) -> tuple[str, ...]:
        """Models it adapts: dit, clip_l, t5xxl."""
        return tuple(dict.fromkeys(path.split(".", 1)[0] for path in self.layers))

    def kinds(self) -> tuple[str, ...]:
        """Kinds of its layers, in order of first sight."""
        return tuple(dict.fromkeys(layer.kind for layer in self.layers.values()))
