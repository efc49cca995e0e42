"""Learning rate schedules: pure functions (step, total) -> factor, so that resume needs no state.

`factor(config, step, total)`: step counts finished optimizer steps, 0 before the first. `Rates` has the rates of all groups,
also for schedule classes of torch, which are run through once at the start.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from fluxsmith.config.schema import ScheduleConfig
from fluxsmith.errors import ConfigError
from fluxsmith.optim.packages import package_class


class Place(NamedTuple):
    """Where a shape is evaluated: steps since the warm-up, of `length`, in a run of `total` steps."""

    step: int
    length: int
    total: int


class Rates:
    """The learning rates of a run's groups at each step; a group whose rate is None finds it by itself."""

    def __init__(self, config: ScheduleConfig, total: int, base: Sequence[float | None]) -> None:
        self.config = config
        self.total = total
        self.base = tuple(base)
        self.warmup = span(config.warmup, total)
        self.table = simulate(config, max(1, total - self.warmup), self.base) if config.name == "imported" else ()

    def at(self, step: int) -> list[float | None]:
        """Rate of each group for the optimizer step that follows `step` finished ones."""
        if self.table and step >= self.warmup:
            return list(self.table[min(step - self.warmup, len(self.table) - 1)])
        scale = factor(self.config, step, self.total)
        return [None if rate is None else rate * scale for rate in self.base]


def span(value: float, total: int) -> int:
    """Steps of a length that is given in steps, or below 1 as a share of the run."""
    return round(value * total) if value < 1 else int(value)


def factor(config: ScheduleConfig, step: int, total: int) -> float:
    """Factor on the learning rate of the optimizer step that follows `step` finished ones; not for `imported` beyond its warm-up."""
    warmup = span(config.warmup, total)
    if step < warmup:
        return _warming(config, step, warmup)
    if config.name == "piecewise_constant":
        return piecewise(config.rules, step)
    shape = SHAPES[config.name](config, Place(step - warmup, max(1, total - warmup), total))
    return config.min_ratio + (1 - config.min_ratio) * max(0.0, shape)


def _warming(config: ScheduleConfig, step: int, warmup: int) -> float:
    """From the first rung of `warmup` + 1, or from zero; transformers' warmup_stable_decay begins at its lowest rate."""
    if config.warmup_from == "first":
        return (step + 1) / (warmup + 1)
    lowest = config.min_ratio if config.name == "warmup_stable_decay" else 0.0
    return lowest + (1 - lowest) * step / warmup


def _constant(config: ScheduleConfig, at: Place) -> float:
    return 1.0


def _linear(config: ScheduleConfig, at: Place) -> float:
    return 1 - min(1.0, at.step / at.length)


def _half_cosines(config: ScheduleConfig, progress: float) -> float:
    """Half a cosine for 1 cycle: cos(pi * cycles * progress), as in the 0.5-cycle default of transformers."""
    return 0.5 * (1 + math.cos(math.pi * config.cycles * min(1.0, progress)))


def _cosine(config: ScheduleConfig, at: Place) -> float:
    return _half_cosines(config, at.step / at.length)


def _cosine_restarts(config: ScheduleConfig, at: Place) -> float:
    progress = at.step / at.length
    return 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * ((config.cycles * progress) % 1.0)))


def _polynomial(config: ScheduleConfig, at: Place) -> float:
    return (1 - min(1.0, at.step / at.length)) ** config.power


def _inverse_sqrt(config: ScheduleConfig, at: Place) -> float:
    """1 / sqrt(1 + step / timescale); the timescale is the warm-up, or 10,000 steps without one."""
    timescale = config.timescale or span(config.warmup, at.total) or 10_000
    return 1 / math.sqrt(1 + at.step / timescale)


def _warmup_stable_decay(config: ScheduleConfig, at: Place) -> float:
    """Constant, then down to the end over `decay` steps (a tenth of the run if not given)."""
    decay = max(1, span(config.decay, at.total) or at.total // 10)
    progress = max(0.0, 1 - (at.length - at.step) / decay)
    if config.decay_shape == "cosine":
        return _half_cosines(config, progress)
    return 1 - (math.sqrt(progress) if config.decay_shape == "1-sqrt" else progress)


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
    return next((value for value, until in sorted(pairs, key=lambda pair: pair[1]) if step < until), final)


def simulate(config: ScheduleConfig, steps: int, base: Sequence[float | None]) -> tuple[tuple[float | None, ...], ...]:
    """Rates of each step by a schedule class, run on stand-ins for the groups. Raises ConfigError if it does not work as one.

    A class that changes the momentum too (OneCycleLR, CyclicLR unless `cycle_momentum = false`) is refused: only rates are taken.
    """
    module, _, name = config.path.rpartition(".")
    kind = package_class(module, name, extra="")
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in base if rate is not None]
    if not groups:
        return ((None,) * len(base),)
    stand_in = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    table = []
    try:
        schedule = kind(stand_in, **config.options)
        for _ in range(steps):
            found = iter([float(group["lr"]) for group in stand_in.param_groups])
            table.append(tuple(None if rate is None else next(found) for rate in base))
            stand_in.step()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the class, about habits of the loop that we do not have
                schedule.step()
    except (TypeError, ValueError, AttributeError) as error:
        fix = "correct schedule.options, or use a schedule that needs the step number alone"
        raise ConfigError(f"{config.path} does not work as a schedule of {steps} steps", why=str(error), fix=fix) from error
    if any(group["momentum"] != 0.9 for group in stand_in.param_groups):
        raise ConfigError(f"{config.path} changes the momentum too", fix="write schedule.options.cycle_momentum = false")
    if not all(rate is None or (math.isfinite(rate) and rate >= 0) for row in table for rate in row):
        raise ConfigError(f"{config.path} gives rates that are negative or not finite", fix="correct schedule.options")
    return tuple(table)
