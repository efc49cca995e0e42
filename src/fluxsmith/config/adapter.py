"""Options every adapter has, whatever its method: which layers, with which rank and rate. A method's `Config` adds its own."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from fluxsmith.config.section import PluginConfig

LayerType = Literal["img_attn", "txt_attn", "img_mlp", "txt_mlp", "img_mod", "txt_mod", "single", "single_mod", "inputs", "clip_l", "t5xxl"]
BLOCK_LIST = r"^(all|none|\d+(-\d+)?(,\d+(-\d+)?)*)$"


class AdapterConfig(PluginConfig):
    """Which layers are adapted. Patterns are regular expressions searched in layer paths such as `dit.double_blocks.3.img_attn.qkv`."""

    rank: PositiveInt = 16
    """Width of the adapter."""
    alpha: PositiveFloat | None = None
    """Strength is alpha / rank; by default alpha = rank."""
    targets: str | tuple[str, ...] = "all"
    """Layers of the transformer: `all` (every linear layer of the blocks), `blocks` (without modulation), `attention`, `mlp`, `inputs`,
    SimpleTuner's sets (`simpletuner:all`, `all+ffs`, `context`, `context+ffs`, `mmdit`, `ai-toolkit`, `tiny`, `nano`), or patterns."""
    exclude: tuple[str, ...] = ()
    """Patterns of layers that are left alone."""
    double_blocks: str = Field("all", pattern=BLOCK_LIST)
    """Double blocks that are adapted: `all`, `none`, or a list such as `0,1,8-12`."""
    single_blocks: str = Field("all", pattern=BLOCK_LIST)
    """Single blocks that are adapted."""
    rank_by_type: dict[LayerType, NonNegativeInt] = {}
    """Rank per kind of layer, for example `{ img_attn = 32, txt_mlp = 0 }`; 0 leaves it alone."""
    rank_by_pattern: dict[str, NonNegativeInt] = {}
    """Rank per pattern, the last match wins over everything else; 0 leaves a layer alone."""
    alpha_by_pattern: dict[str, PositiveFloat] = {}
    """Alpha per pattern; the last match wins."""
    text_encoders: tuple[Literal["clip_l", "t5xxl"], ...] = ()
    """Text encoders that are adapted too (captions are then encoded at every step)."""
    dit_lr: NonNegativeFloat | None = None
    """Learning rate of the transformer's layers; by default `optim.lr`; 0 trains none of them."""
    clip_l_lr: NonNegativeFloat | None = None
    """Learning rate of CLIP-L's layers; by default `optim.lr`."""
    t5xxl_lr: NonNegativeFloat | None = None
    """Learning rate of T5's layers; by default `optim.lr`."""
    lr_by_pattern: dict[str, NonNegativeFloat] = {}
    """Learning rate per pattern; the last match wins over the others."""
    init_from: Path | None = None
    """Adapter file to start from, in any format that can be read."""
    rank_from_file: bool = False
    """Take layers, ranks and alphas from `init_from` instead of the options above."""

    @field_validator("exclude", "rank_by_pattern", "alpha_by_pattern", "lr_by_pattern")
    @classmethod
    def _patterns_compile(cls, value: tuple[str, ...] | dict[str, float]) -> tuple[str, ...] | dict[str, float]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return value
