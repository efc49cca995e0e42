"""The timestep shift of FLUX: bigger pictures need more steps at high noise (Esser et al. 2024, section 5.3.2).

Shared by sampling (schedules) and training (noise levels), so that both mean the same thing.
"""

import math

from torch import Tensor

SHORT, LONG = (256, 0.5), (4096, 1.15)  # image tokens and mu at both ends (black-forest-labs/flux sampling.py)


def shift_for_tokens(tokens: int) -> float:
    """exp(mu), mu linear in the number of image tokens, not clamped."""
    slope = (LONG[1] - SHORT[1]) / (LONG[0] - SHORT[0])
    return math.exp(SHORT[1] + slope * (tokens - SHORT[0]))


def apply_shift(sigma: Tensor, shift: float) -> Tensor:
    """shift * s / (1 + (shift - 1) * s); 0 and 1 stay in place."""
    return shift * sigma / (1 + (shift - 1) * sigma)
