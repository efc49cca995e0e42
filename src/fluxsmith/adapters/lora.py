"""LoRA (Hu et al. 2021): y + strength * alpha / rank * up(down(x)). `adapter = { type = "lora", rank = 16, targets = "all" }`.

A fused layer has one pair of factors, or with `split_qkv` one pair for each of q, k, v (and mlp). DoRA over it is `dora.py`.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxsmith.adapters.additive import Additive
from fluxsmith.adapters.base import AdapterSet
from fluxsmith.adapters.build import build
from fluxsmith.adapters.formats.state import Part, lora_part
from fluxsmith.adapters.ggpo import Perturbation, product_row_norms
from fluxsmith.adapters.init import INITS
from fluxsmith.adapters.load import load_adapter
from fluxsmith.adapters.rows import part_modules
from fluxsmith.adapters.targets import Target
from fluxsmith.config.adapter import LoraConfig
from fluxsmith.models.linear import Factors, Linear

__all__ = ["PART", "Config", "LoraPart", "load_adapter", "lora_start", "prepare_loras"]


class Config(LoraConfig):
    """Low-rank factors beside each layer."""

    def build(self, models: Mapping[str, nn.Module], *, seed: int = 0, dtype: torch.dtype | None = None) -> AdapterSet:
        """The adapters for the loaded models (`dit`, `clip_l`, `t5xxl`), attached, with learning-rate groups.

        `dtype` of the factors is float32 by default. Raises ConfigError for targets that hit nothing, and for a starting file
        that does not fit.
        """

        def start(target: Target, base: Linear, seed: int) -> Part:
            return lora_start(self, target, seed)

        made = build(self, models, start, seed=seed, dtype=dtype, split=self.split_qkv)
        prepare_loras(self, made)
        return made


def lora_start(config: LoraConfig, target: Target, seed: int) -> Part:
    """Fresh factors; their product is zero."""
    down, up = INITS[config.init](target, seed)
    return lora_part(target.part, *target.rows, down, up, config.stored_alpha(target))


def prepare_loras(config: LoraConfig, made: AdapterSet) -> None:
    """Dropouts, the norm limit and GGPO of a config, on the attached adapters."""
    made.max_norm = config.max_norm
    for part in part_modules(made):
        if isinstance(part, LoraPart):
            part.dropouts = (config.dropout, config.rank_dropout)
            if config.ggpo_sigma is not None and config.ggpo_beta is not None:
                part.ggpo = Perturbation(config.ggpo_sigma, config.ggpo_beta, part.base_rows())


class LoraPart(Additive):
    """down (rank, in) and up (rows, rank); `scale` is alpha / rank."""

    kind = "lora"
    down: Tensor
    up: Tensor

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        self.scale = torch.tensor(part.scale, dtype=torch.float64)  # no buffer: a cast of the model must not round it
        self.dropouts = (0.0, 0.0)  # on activations, on ranks
        self.ggpo: Perturbation | None = None

    def carrier(self) -> str | None:
        """As PartModule.carrier."""
        return "up"

    def matrix(self) -> Tensor:
        """As Additive.matrix."""
        return (self.up @ self.down) * self.scale

    def product(self, x: Tensor, strength: Tensor) -> Tensor:
        """As Additive.product; dropout and GGPO in train mode only."""
        own = self.input(x, self.down)
        hidden = F.linear(own, self.down)  # (..., rank)
        if self.training:
            hidden = self.drop(hidden)
        made = F.linear(hidden * (self.scale * strength), self.up)
        if self.training and self.ggpo is not None:
            made = made + self.ggpo.noise(own, made.dtype)
        return made

    def factors(self) -> Factors | None:
        """As PartModule.factors: not under DoRA, not while something is drawn."""
        if self.bias is not None or self.magnitude is not None or (self.training and (any(self.dropouts) or self.ggpo is not None)):
            return None
        return self.down, self.up, self.scale

    def drop(self, hidden: Tensor) -> Tensor:
        """Rank activations (B, ..., rank) with some set to zero: single ones, or whole ranks per sample; the rest scaled up."""
        dropout, rank_dropout = self.dropouts
        if dropout:
            hidden = F.dropout(hidden, dropout)
        if rank_dropout:
            shape = (hidden.shape[0], *[1] * (hidden.dim() - 2), hidden.shape[-1])  # one draw per sample, the same for all tokens
            kept = torch.rand(shape, device=hidden.device) > rank_dropout
            hidden = hidden * kept / (1 - rank_dropout)
        return hidden

    def norm(self) -> float:
        """Frobenius norm of the scaled product, from the small Gram matrix of the factors."""
        rows = product_row_norms(self.up.detach().double(), self.down.detach().double())
        return float(torch.linalg.vector_norm(rows)) * abs(float(self.scale))

    def limit(self, ratio: float) -> None:
        """As PartModule.limit; both factors get the root."""
        for param in (self.up, self.down):
            param.mul_(ratio**0.5)

    def after_backward(self) -> None:
        """As PartModule.after_backward."""
        if self.ggpo is not None:
            self.ggpo.after_backward(self.down, self.up, float(self.scale))

    def after_step(self) -> dict[str, float]:
        """As PartModule.after_step."""
        return {} if self.ggpo is None else self.ggpo.after_step(self.down, self.up, float(self.scale))

    def extra(self) -> dict[str, Tensor]:
        """As PartModule.extra."""
        return {} if self.ggpo is None or self.ggpo.gradient is None else {"ggpo": self.ggpo.gradient}

    def load_extra(self, values: Mapping[str, Tensor]) -> None:
        """As PartModule.load_extra."""
        if self.ggpo is not None and "ggpo" in values:
            self.ggpo.gradient = values["ggpo"].to(self.up.device)
            self.ggpo.after_step(self.down, self.up, float(self.scale))


PART = LoraPart
