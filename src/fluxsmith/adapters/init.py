"""How new factors begin. Draws are keyed by (seed, "init", layer), so a layer starts equal whatever else is adapted.

`down, up = INITS["default"](target, seed)`; the product is zero at the start.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fluxsmith.adapters.targets import Target
from fluxsmith.randomness import generator

Factors = tuple[Tensor, Tensor]  # down (rank, in), up (rows, rank)


def default(target: Target, seed: int) -> Factors:
    """Down uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5, as sd-scripts and PEFT), up zero."""
    bound = target.layer.in_features**-0.5
    down = torch.empty(target.rank, target.layer.in_features).uniform_(-bound, bound, generator=generator(seed, "init", target.name))
    return down, _zero_up(target)


def gaussian(target: Target, seed: int) -> Factors:
    """Down normal with standard deviation 1/rank (as PEFT), up zero."""
    down = torch.empty(target.rank, target.layer.in_features).normal_(0, 1 / target.rank, generator=generator(seed, "init", target.name))
    return down, _zero_up(target)


def _zero_up(target: Target) -> Tensor:
    start, stop = target.rows
    return torch.zeros(stop - start, target.rank)


def kaiming(shape: tuple[int, int], target: Target, seed: int, tensor: str) -> Tensor:
    """Uniform in +-1/sqrt(columns); each named tensor of a layer has a draw of its own."""
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator(seed, "init", target.name, tensor))


def normal(shape: tuple[int, int], deviation: float, target: Target, seed: int, tensor: str) -> Tensor:
    """Normal with a standard deviation; each named tensor of a layer has a draw of its own."""
    return torch.empty(shape).normal_(0, deviation, generator=generator(seed, "init", target.name, tensor))


INITS: Mapping[str, Callable[[Target, int], Factors]] = {"default": default, "gaussian": gaussian}
