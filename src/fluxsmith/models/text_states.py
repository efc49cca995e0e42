"""Encoded prompts, as they travel from the encoders (or a cache) to the transformer."""

from typing import NamedTuple

import torch
from torch import Tensor


class TextStates(NamedTuple):
    """Encoded prompts: T5 rows, CLIP's pooled vector, and which T5 rows are real tokens."""

    txt: Tensor  # (B, T, D_txt)
    pooled: Tensor  # (B, D_pooled)
    mask: Tensor  # (B, T) bool, True on real tokens

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "TextStates":
        """Moved, and cast where floating."""
        return TextStates(self.txt.to(device, dtype), self.pooled.to(device, dtype), self.mask.to(device))
