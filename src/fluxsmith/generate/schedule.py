"""The noise levels a picture passes through: sigma from 1 (noise) to 0 (picture)."""

from typing import Literal

import torch
from torch import Tensor

from fluxsmith.errors import ConfigError
from fluxsmith.models.shift import apply_shift, shift_for_tokens

Shift = Literal["flux", "none"] | float


def sigmas(steps: int, *, tokens: int, shift: Shift = "flux", strength: float = 1.0) -> Tensor:
    """steps + 1 levels in fp32, the last one 0.

    `shift`: "flux" by the number of image tokens (dev), "none" (schnell), or a fixed number. `strength` below 1 starts
    part of the way, for image to image: the first `1 - strength` of the steps are left out (1 step always remains).
    """
    if steps < 1 or not 0 < strength <= 1:
        raise ConfigError(f"steps = {steps}, strength = {strength}", why="at least 1 step, strength in (0, 1]", fix="change them")
    levels = torch.linspace(1, 0, steps + 1, dtype=torch.float32)
    factor = shift_for_tokens(tokens) if shift == "flux" else 1.0 if shift == "none" else float(shift)
    if factor != 1.0:
        levels = apply_shift(levels, factor)
    skipped = min(steps - 1, round(steps * (1 - strength)))
    return levels[skipped:]
