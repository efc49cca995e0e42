"""Noise levels: the shift of each preset by its formula, and where image to image begins."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run
import torch

from fluxsmith.config.choice import config_class
from fluxsmith.errors import ConfigError
from fluxsmith.generate.pipeline import Pipeline, start_noise
from fluxsmith.generate.request import Request
from fluxsmith.generate.schedule import sigmas

FAMILY = "fluxsmith.models.family"


def shift_of(preset: str) -> float | str:
    return config_class(FAMILY, "flux1").model_validate({"type": "flux1", "preset": preset}).sampling_defaults()["shift"]


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (4096, 1.15), (1024, 0.63), (16384, 3.23)])
def test_dev_shifts_by_the_number_of_tokens(tokens: int, mu: float) -> None:
    """BFL: mu is linear through (256, 0.5) and (4096, 1.15), and s' = e^mu / (e^mu + 1/s - 1)."""
    assert shift_of("dev") == "flux"
    levels = sigmas(10, tokens=tokens, shift="flux")
    expected = [1.0, *[math.exp(mu) / (math.exp(mu) + 1 / s - 1) for s in (1 - step / 10 for step in range(1, 10))], 0.0]
    assert torch.allclose(levels.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def test_schnell_has_no_shift() -> None:
    assert shift_of("schnell") == "none"
    assert sigmas(4, tokens=4096, shift="none").tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_fixed_shift_does_not_depend_on_the_size() -> None:
    levels = sigmas(4, tokens=256, shift=3.0)
    assert torch.equal(levels, sigmas(4, tokens=4096, shift=3.0))
    assert levels.tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0], abs=1e-6)


def test_larger_pictures_stay_longer_at_high_noise() -> None:
    small, large = sigmas(8, tokens=256), sigmas(8, tokens=4096)
    assert bool((large[1:-1] > small[1:-1]).all())
    assert bool((small.diff() < 0).all())


@pytest.mark.ledger("DS-04")
@pytest.mark.parametrize(("strength", "left"), [(1.0, 10), (0.6, 6), (0.3, 3), (0.01, 1)])
def test_image_to_image_leaves_the_first_steps_out(strength: float, left: int) -> None:
    """The levels that are walked are those of the full schedule, so the same strength means the same noise at any size."""
    full = sigmas(10, tokens=1024)
    part = sigmas(10, tokens=1024, strength=strength)
    assert len(part) == left + 1
    assert torch.equal(part, full[10 - left :])


@pytest.mark.parametrize(("steps", "strength"), [(0, 1.0), (4, 0.0), (4, 1.5), (4, -0.5)])
def test_impossible_values_are_refused(steps: int, strength: float) -> None:
    with pytest.raises(ConfigError):
        sigmas(steps, tokens=256, strength=strength)


def test_explicit_levels_and_noise_take_the_place_of_the_schedule(tmp_path: Path) -> None:
    pipeline = Pipeline.load(tiny_run.config(tiny_run.write_model(tmp_path / "model"), tmp_path / "run").model, device="cpu")
    plain = Request("a", width=32, height=32, steps=2, shift="none", guidance=1.0, seed=3)
    same = replace(plain, steps=None, seed=9, sigmas=(1.0, 0.5, 0.0), noise=start_noise(3, 16, 4, 4))
    expected = pipeline.generate(plain).image
    assert pipeline.generate(same).image.tobytes() == expected.tobytes()
    assert pipeline.generate(replace(same, sigmas=(1.0, 0.8, 0.0))).image.tobytes() != expected.tobytes()
    assert same.settings()["sigmas"] == (1.0, 0.5, 0.0)
    assert "sigmas" not in plain.settings()


@pytest.mark.parametrize("levels", [(), (1.0,), (1.0, 0.5), (0.5, 0.8, 0.0), (1.2, 0.0)])
def test_levels_that_are_no_schedule_are_refused(levels: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="they start at 1 or below"):
        Request("a", sigmas=levels).check()
