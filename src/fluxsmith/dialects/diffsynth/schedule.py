"""DiffSynth-Studio's noise levels: evenly spaced, then shifted by a fixed 3 whatever the size, and the step after the last goes to 0.

A strength below 1 shortens the range; the number of steps stays.
"""

import torch

SHIFT = 3.0
LOWEST = 0.003 / 1.002


def levels(steps: int, strength: float = 1.0, shift: float | None = None) -> tuple[float, ...]:
    """steps + 1 levels in [0, 1], the last one 0. u from `start` to 0.003 / 1.002, then k u / (1 + (k - 1) u)."""
    k = SHIFT if shift is None else shift
    even = torch.linspace(LOWEST + (1 - LOWEST) * strength, LOWEST, steps)
    return (*(k * even / (1 + (k - 1) * even)).tolist(), 0.0)
