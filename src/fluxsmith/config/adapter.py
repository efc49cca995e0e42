"""Options every adapter has, whatever its method: which layers, with which rank and rate. A method's `Config` adds its own.

The classes below AdapterConfig are what families of methods share: factors of a rank, DoRA over them, rotations.
"""

import math
import re
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from fluxsmith.config.section import PluginConfig

LayerType = Literal["img_attn", "txt_attn", "img_mlp", "txt_mlp", "img_mod", "txt_mod", "single", "single_mod", "inputs", "clip_l", "t5xxl"]
BLOCK_LIST = r"^(all|none|\d+(-\d+)?(,\d+(-\d+)?)*)$"


class AdapterConfig(PluginConfig):
    """Which layers are adapted. Patterns are regular expressions searched in layer paths such as `dit.double_blocks.3.img_attn.qkv`,
    or, after `kohya:`, in sd-scripts' names such as `lora_unet_double_blocks_3_img_attn_qkv`."""

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
    module_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that a layer's adapter is skipped for one forward in training."""
    init_from: Path | None = None
    """Adapter file to start from, in any format that can be read."""
    init_unused: Literal["error", "ignore"] = "error"
    """What to do about layers of `init_from` that are not adapted here."""
    rank_from_file: bool = False
    """Take layers, ranks and alphas from `init_from` instead of the options above."""

    def plus_ratio(self, role: str) -> float:
        """Rate of the up factors relative to the others, for `dit`, `clip_l` or `t5xxl`; only LoRA has one."""
        return 1.0

    @field_validator("exclude", "rank_by_pattern", "alpha_by_pattern", "lr_by_pattern")
    @classmethod
    def _patterns_compile(cls, value: tuple[str, ...] | dict[str, float]) -> tuple[str, ...] | dict[str, float]:
        for pattern in value:
            try:
                re.compile(pattern.removeprefix("kohya:"))
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return value


class RankAndAlpha(Protocol):
    """A target as far as its strength is concerned."""

    @property
    def rank(self) -> int:
        """Width."""
        ...

    @property
    def alpha(self) -> float:
        """As configured."""
        ...


class FactorConfig(AdapterConfig):
    """Methods whose strength is alpha / rank."""

    rslora: bool = False
    """Strength alpha / sqrt(rank) instead of alpha / rank."""

    def stored_alpha(self, target: RankAndAlpha) -> float:
        """Alpha as files have it, where the strength is alpha / rank."""
        return target.alpha * math.sqrt(target.rank) if self.rslora else target.alpha


class DecomposedConfig(FactorConfig):
    """Methods that DoRA can go over (`dora` itself is the one over LoRA)."""

    weight_decompose: bool = False
    """DoRA: the norms of the changed weight are trained on their own."""
    norm_per: Literal["output", "input"] = "output"
    """DoRA's norms: one for each output row, or for each input column."""


class RotationConfig(AdapterConfig):
    """LyCORIS' orthogonal methods."""

    constraint: NonNegativeFloat = 0.0
    """Largest norm of a layer's rotation, per output row; 0 for none."""
    rescale: bool = False
    """Each output row has a trained factor too."""

    @model_validator(mode="after")
    def _has_a_constraint(self) -> "RotationConfig":
        if self.alpha is not None or self.alpha_by_pattern:
            raise ValueError("a rotation has a constraint instead of alpha: set constraint, drop alpha and alpha_by_pattern")
        return self


class LoraConfig(FactorConfig):
    """LoRA, alone or under DoRA."""

    init: Literal["default", "gaussian"] = "default"
    """How the down factor begins (up is zero): uniform, or normal."""
    split_qkv: bool = False
    """Separate factors for q, k, v (and mlp) of fused layers."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of rank activations set to zero in training."""
    rank_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of ranks left out per sample in training; the others are scaled up."""
    loraplus_ratio: PositiveFloat = 1.0
    """Learning rate of the up factors relative to the down factors (LoRA+)."""
    loraplus_dit_ratio: PositiveFloat | None = None
    """The same for the transformer alone; goes before `loraplus_ratio`."""
    loraplus_text_ratio: PositiveFloat | None = None
    """The same for the text encoders."""
    max_norm: PositiveFloat | None = None
    """Largest Frobenius norm of what a layer's adapter adds; larger ones are scaled down after each step."""
    ggpo_sigma: NonNegativeFloat | None = None
    """LoRA-GGPO: noise relative to the norm of each weight row; needs `ggpo_beta`. A dense random matrix per layer and forward."""
    ggpo_beta: NonNegativeFloat | None = None
    """LoRA-GGPO: noise relative to the squared gradient of each weight row; needs `ggpo_sigma`."""

    @model_validator(mode="after")
    def _ggpo_is_whole(self) -> "LoraConfig":
        if (self.ggpo_sigma is None) != (self.ggpo_beta is None):
            raise ValueError("ggpo_sigma and ggpo_beta go together: set both, or none")
        return self

    def plus_ratio(self, role: str) -> float:
        """As AdapterConfig.plus_ratio."""
        own = self.loraplus_dit_ratio if role == "dit" else self.loraplus_text_ratio
        return self.loraplus_ratio if own is None else own
