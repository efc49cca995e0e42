"""Guidance distillation: the target by its formula, the teacher that stays, and what it needs."""

from pathlib import Path

import pytest
import tiny_run
import torch
from ran import Go, same

from fluxsmith.config.schema import NoiseConfig
from fluxsmith.data.types import Batch
from fluxsmith.errors import ConfigError
from fluxsmith.models.assembly import Level, Models, TextStates, velocity
from fluxsmith.models.files import locate
from fluxsmith.models.loading import LazyModels
from fluxsmith.train.noise import draw, noisy_input
from fluxsmith.train.objectives.guidance import Config

CPU = torch.device("cpu")
RANGE = NoiseConfig(guidance=(1.0, 5.0))


@pytest.fixture
def models(tmp_path: Path) -> Models:
    config = tiny_run.config(tiny_run.write_model(tmp_path), tmp_path / "run")
    return LazyModels(locate(config.model), config.model, CPU).get(("dit", "clip_l", "t5xxl"))


def test_a_range_is_needed() -> None:
    with pytest.raises(ConfigError, match="one value"):
        Config(type="guidance").build(NoiseConfig(guidance=2.0), 0)


@torch.no_grad()
@pytest.mark.parametrize("mask_text", [False, True])
def test_the_target(models: Models, mask_text: bool) -> None:
    models.mask_text = mask_text
    objective = Config(type="guidance", teacher_guidance=1.5).build(RANGE, 3)
    objective.start(models)
    latents = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    text = models.encode_text(["a red circle", "a blue square"])
    batch = Batch(("a", "b"), (4, 5), ("", ""), latents, None, text, torch.ones(2))
    draws = draw(RANGE, 3, (4, 5), latents.shape[1:])
    noisy = noisy_input(latents, draws.noise, draws.sigma)
    assert models.dit is not None
    empty = TextStates(*(part.expand(2, *part.shape[1:]) for part in models.encode_text([""])))
    fixed = Level(draws.sigma, torch.full((2,), 1.5))
    with_text, without = (velocity(models.dit, noisy, states, fixed, mask_text=mask_text) for states in (text, empty))
    student = velocity(models.dit, noisy, text, Level(draws.sigma, draws.guidance), mask_text=mask_text)
    target = without + draws.guidance.view(2, 1, 1, 1) * (with_text - without)
    torch.testing.assert_close(objective.loss(models, batch, CPU).total, (student - target).square().mean())


def test_it_trains_the_student_and_never_the_teacher(go: Go) -> None:
    changes = {"objective": {"type": "guidance"}, "noise.guidance": [1.0, 5.0], "train.steps": 30, "optim.lr": 2e-3}
    ran = go(changes)
    losses = [float.fromhex(loss) for loss in ran.losses]
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])


def test_the_teacher_of_a_resumed_run_is_the_starting_model(go: Go) -> None:
    """Not the half-trained student."""
    changes = {"objective": {"type": "guidance"}, "noise.guidance": [1.0, 5.0], "schedule.name": "constant"}
    straight = go({**changes, "train.steps": 6}, "straight")
    go(changes)
    resumed = go({**changes, "train.steps": 6}, resume=True)
    assert resumed.losses == straight.losses
    assert same(resumed.weights, straight.weights)


def test_a_model_without_the_embedder_is_refused() -> None:
    plain = tiny_run.random_dit()
    objective = Config(type="guidance").build(RANGE, 0)
    with pytest.raises(ConfigError, match="embedder"):
        objective.start(Models())
    with pytest.raises(ValueError, match="start"):
        objective.loss(Models(dit=plain), None, CPU)  # type: ignore[arg-type]
