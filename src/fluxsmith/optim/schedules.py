"""Learning rate schedules: a pure function (step, total) -> factor, so that resume needs no state.

`factor(config, step, total)`: step counts finished optimizer steps, 0 before the first.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from fluxsmith.config.schema import ScheduleConfig
from fluxsmith.errors import ConfigError


class Place(NamedTuple):
    """Where a shape is evaluated: steps since the warm-up, of `length`, in a run of `total` steps."""

    step: int
    length: int
    total: int


def span(value: float, total: int) -> int:
    """Steps of a length that is given in steps, or below 1 as a share of the run."""
    return round(value * total) if value < 1 else int(value)


def factor(config: ScheduleConfig, step: int, total: int) -> float:
    """Factor on the learning rate of the optimizer step that follows `step` finished ones."""
    warmup = span(config.warmup, total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.name == "piecewise_constant":
        return piecewise(config.rules, step)
    shape = SHAPES[config.name](config, Place(step - warmup, max(1, total - warmup), total))
    return config.min_ratio + (1 - config.min_ratio) * max(0.0, shape)


def _constant(config: ScheduleConfig, at: Place) -> float:
    return 1.0


def _linear(config: ScheduleConfig, at: Place) -> float:
    return 1 - min(1.0, at.step / at.length)


def _cosine(config: ScheduleConfig, at: Place) -> float:
    """Half a cosine for 1 cycle: cos(pi * cycles * progress), as in the 0.5-cycle default of transformers."""
    return 0.5 * (1 + math.cos(math.pi * config.cycles * min(1.0, at.step / at.length)))


def _cosine_restarts(config: ScheduleConfig, at: Place) -> float:
    progress = at.step / at.length
    return 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * ((config.cycles * progress) % 1.0)))


def _polynomial(config: ScheduleConfig, at: Place) -> float:
    return (1 - min(1.0, at.step / at.length)) ** config.power


def _inverse_sqrt(config: ScheduleConfig, at: Place) -> float:
    """1 / sqrt(1 + step / timescale); the timescale is the warm-up, or 10,000 steps without one."""
    timescale = span(config.warmup, at.total) or 10_000
    return 1 / math.sqrt(1 + at.step / timescale)


def _warmup_stable_decay(config: ScheduleConfig, at: Place) -> float:
    """Constant, then linear to the end over `decay` steps (a tenth of the run if not given)."""
    decay = max(1, span(config.decay, at.total) or at.total // 10)
    return min(1.0, (at.length - at.step) / decay)


SHAPES: dict[str, Callable[[ScheduleConfig, Place], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_restarts": _cosine_restarts,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
}


def piecewise(rules: str, step: int) -> float:
    """`1:500,0.5:800,0.1`: factor 1 until step 500, 0.5 until 800, then 0.1. Raises ConfigError for anything else."""
    try:
        *parts, last = rules.split(",")
        pairs = [(float(value), int(until)) for value, until in (part.split(":") for part in parts)]
        final = float(last)
    except ValueError:
        raise ConfigError(f"schedule.rules = {rules!r} cannot be read", fix="write factor:until_step,...,last_factor") from None
    return next((value for value, until in pairs if step < until), final)
