"""DoRA (Liu et al. 2024): LoRA's direction with a trained length of each row. `adapter = { type = "dora", rank = 16 }`.

Files hold LyCORIS' `dora_scale` or PEFT's `lora_magnitude_vector`. The maths is in `additive.py`; LoKr and LoHa have it as
`weight_decompose`.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from fluxsmith.adapters.additive import with_magnitude
from fluxsmith.adapters.base import AdapterSet
from fluxsmith.adapters.build import build
from fluxsmith.adapters.formats.state import Part
from fluxsmith.adapters.lora import lora_start, prepare_loras
from fluxsmith.adapters.targets import Target
from fluxsmith.config.adapter import LoraConfig
from fluxsmith.models.linear import Linear


class Config(LoraConfig):
    """LoRA with the norms of the changed weight trained on their own."""

    norm_per: Literal["output", "input"] = "output"
    """One norm for each output row, or for each input column (which PEFT and diffusers do not know)."""
    hold_norm: bool = False
    """Treat the norm of the changed weight as a constant in backward, as PEFT does; saves memory."""

    def build(self, models: Mapping[str, nn.Module], *, seed: int = 0, dtype: torch.dtype | None = None) -> AdapterSet:
        """The adapters for the loaded models, attached. Raises ConfigError as `build.build`."""

        def start(target: Target, base: Linear, seed: int) -> Part:
            first, last = target.rows
            rule = "peft" if self.hold_norm else "interpolated"
            return with_magnitude(lora_start(self, target, seed), base.dequantize()[first:last], self.norm_per, rule)

        made = build(self, models, start, seed=seed, dtype=dtype, split=self.split_qkv)
        prepare_loras(self, made)
        return made
