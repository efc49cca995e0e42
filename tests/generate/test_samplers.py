"""Integrators against flows whose solution is known."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fluxsmith.generate.samplers import SAMPLERS, Velocity, euler, heun


def levels(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def counted(velocity: Velocity) -> tuple[Velocity, list[float]]:
    calls: list[float] = []

    def call(x: Tensor, sigma: float) -> Tensor:
        calls.append(sigma)
        return velocity(x, sigma)

    return call, calls


@pytest.fixture
def clean() -> Tensor:
    return torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_straight_paths_are_exact(sampler: Callable[..., Tensor], steps: int, clean: Tensor, noise: Tensor) -> None:
    """With v = noise - clean everywhere, x(s) = (1 - s) clean + s noise, whatever the steps are."""
    found = sampler(lambda x, sigma: noise - clean, noise, levels(steps))
    assert torch.allclose(found, clean, atol=1e-12)


def error(sampler: Callable[..., Tensor], steps: int) -> float:
    """Of dx/ds = x, whose solution at 0 is x(1) / e."""
    found = sampler(lambda x, sigma: x, torch.ones(1, 1, 1, 1, dtype=torch.float64), levels(steps))
    return abs(found.item() - 1 / math.e)


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_orders(sampler: Callable[..., Tensor], order: int) -> None:
    """Half the step makes the error 2^order times smaller."""
    assert error(sampler, 64) / error(sampler, 128) == pytest.approx(2**order, rel=0.1)


def test_costs() -> None:
    for sampler, count in ((euler, 5), (heun, 9)):  # heun: the last step ends at 0, where there is nothing to look ahead to
        velocity, calls = counted(lambda x, sigma: x)
        sampler(velocity, torch.ones(1, 1, 1, 1), levels(5))
        assert len(calls) == count
        assert min(calls) > 0


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_the_callback_sees_each_step_and_the_clean_estimate(sampler: Callable[..., Tensor], clean: Tensor, noise: Tensor) -> None:
    seen: list[tuple[int, Tensor, Tensor]] = []
    walk = levels(4)
    result = sampler(lambda x, sigma: noise - clean, noise, walk, lambda *step: seen.append(step))
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[-1][1], result)
    for step, x, estimate in seen:
        sigma = walk[step + 1]
        assert torch.allclose(x, (1 - sigma) * clean + sigma * noise, atol=1e-12)
        assert torch.allclose(estimate, clean, atol=1e-12)


def test_the_callback_changes_nothing(noise: Tensor) -> None:
    for sampler in SAMPLERS.values():
        velocity = lambda x, sigma: torch.sin(x) * sigma  # noqa: E731
        assert torch.equal(sampler(velocity, noise, levels(4)), sampler(velocity, noise, levels(4), lambda *step: None))
