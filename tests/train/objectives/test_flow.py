"""The flow objective: its distances against formulas, the pure step, and what a batch may carry."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from torch import Tensor

from fluxsmith.config.schema import NoiseConfig
from fluxsmith.data.types import Batch, TextStates
from fluxsmith.models.assembly import Models
from fluxsmith.models.load import load_ae
from fluxsmith.train.noise import Draws
from fluxsmith.train.objectives.flow import Config, Flow, batch_latents, batch_text, element_loss, threshold

CPU = torch.device("cpu")
DIFFERENCE = torch.linspace(-2, 2, 64, dtype=torch.float64).view(2, 2, 4, 4)
SIGMA = torch.tensor([0.25, 0.75], dtype=torch.float64)


def elements(**options: Any) -> Tensor:
    return element_loss(Config(type="flow", **options), DIFFERENCE, SIGMA)


def test_square_and_absolute() -> None:
    assert torch.equal(elements(), DIFFERENCE**2)
    assert torch.equal(elements(loss="l1"), DIFFERENCE.abs())


@pytest.mark.parametrize("schedule", ["constant", "exponential"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_huber(schedule: str, scale: float) -> None:
    """2c (sqrt(d^2 + c^2) - c): about d^2 for small d, about 2c|d| for large; smooth_l1 leaves the factor c out."""
    c = scale * (0.1**SIGMA if schedule == "exponential" else torch.full_like(SIGMA, 0.1)).view(2, 1, 1, 1)
    options = {"huber_c": 0.1, "huber_scale": scale, "huber_schedule": schedule}
    root = (DIFFERENCE**2 + c**2).sqrt() - c
    torch.testing.assert_close(elements(loss="huber", **options), 2 * c * root)
    torch.testing.assert_close(elements(loss="smooth_l1", **options), 2 * root)
    small = element_loss(Config(type="flow", loss="huber", **options), torch.full((2, 1, 1, 1), 1e-5, dtype=torch.float64), SIGMA)
    torch.testing.assert_close(small, torch.full_like(small, 1e-10), rtol=1e-3, atol=0)


def test_the_threshold_falls_with_noise() -> None:
    config = Config(type="flow", huber_c=0.1, huber_schedule="exponential")
    torch.testing.assert_close(threshold(config, torch.tensor([0.0, 0.5, 1.0])), torch.tensor([1.0, 0.1**0.5, 0.1]))


def batch(**changes: Any) -> Batch:
    generator = torch.Generator().manual_seed(0)
    text = TextStates(*(torch.randn(*shape, tiny_run.TEXT, generator=generator) for shape in ((2, 5), (2,))), torch.ones(2, 5).bool())
    latents = torch.randn(2, 16, 4, 4, generator=generator)
    return Batch(("a.png", "b.png"), (3, 9), ("a", "b"), latents, None, text, torch.ones(2))._replace(**changes)


def objective(noise: dict[str, Any] | None = None, **options: Any) -> Flow:
    return Config(type="flow", **options).build(NoiseConfig(**(noise or {})), 7)


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(dit=tiny_run.random_dit())


@torch.no_grad()
def test_a_loss_is_fixed_by_weights_batch_and_seed(models: Models) -> None:
    one, again = objective().loss(models, batch(), CPU), objective().loss(models, batch(), CPU)
    assert torch.equal(one.total, again.total)
    assert one.per_sample.shape == one.sigma.shape == (2,)
    other = objective().loss(models, batch(indices=(3, 10)), CPU)
    assert other.per_sample[0] == pytest.approx(float(one.per_sample[0]), rel=1e-5)
    assert other.per_sample[1] != one.per_sample[1]


@torch.no_grad()
def test_a_model_that_knows_the_answer_has_no_loss(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is noise - picture at the drawn level."""
    given, flow = batch(), objective()
    draws = flow.draws(given.latents, given)
    monkeypatch.setattr("fluxsmith.train.objectives.flow.velocity", lambda *args, **options: draws.noise - given.latents)
    assert flow.loss(models, given, CPU).total == 0
    monkeypatch.setattr("fluxsmith.train.objectives.flow.velocity", lambda *args, **options: draws.noise - given.latents + 0.5)
    torch.testing.assert_close(flow.loss(models, given, CPU).total, torch.tensor(0.25))


@torch.no_grad()
def test_weights_and_mask_of_the_batch_count(models: Models) -> None:
    plain = objective().loss(models, batch(), CPU)
    halved = objective().loss(models, batch(weights=torch.tensor([0.5, 1.0])), CPU)
    torch.testing.assert_close(halved.per_sample, plain.per_sample * torch.tensor([0.5, 1.0]))
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., 0, 0] = 1
    assert objective().loss(models, batch(mask=mask), CPU).total != plain.total


@torch.no_grad()
@pytest.mark.ledger("KS-15")
def test_guidance_reaches_the_model(models: Models) -> None:
    given = batch()
    flow = objective()
    draws = flow.draws(given.latents, given)
    losses = {
        float(flow.loss_at(models, given.latents, given.text, given, Draws(draws.sigma, draws.noise, torch.full((2,), g))).total)
        for g in (1.0, 3.5)
    }
    assert len(losses) == 2
    assert float(objective({"guidance": 3.5}).loss(models, given, CPU).total) in losses


@torch.no_grad()
def test_pixels_are_encoded_in_the_step(tmp_path: Path) -> None:
    tiny_run.write_model(tmp_path)
    ae = load_ae(tmp_path / "ae.safetensors")
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    given = batch(latents=None, pixels=pixels)
    assert torch.equal(batch_latents(Models(ae=ae), given, CPU), ae.encode(pixels))
    with pytest.raises(ValueError, match="autoencoder"):
        batch_latents(Models(), given, CPU)


def test_text_comes_in_the_type_of_the_transformer(models: Models) -> None:
    half = Models(dit=tiny_run.random_dit().bfloat16())
    assert batch_text(half, batch(), CPU).txt.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="must be loaded"):
        batch_text(models, batch(text=None), CPU)
    with pytest.raises(ValueError, match="DiT"):
        objective().loss(Models(), batch(), CPU)


@torch.no_grad()
@pytest.mark.ledger("KS-29")
def test_input_noise_reaches_the_model_and_not_the_target(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    given, flow = batch(), objective({"input_noise": 0.3})
    draws = flow.draws(given.latents, given)
    assert draws.extra is not None
    s = draws.sigma.view(2, 1, 1, 1)
    seen: list[Tensor] = []

    def velocity(dit: object, noisy: Tensor, *rest: object, **options: object) -> Tensor:
        seen.append(noisy)
        return draws.noise - given.latents

    monkeypatch.setattr("fluxsmith.train.objectives.flow.velocity", velocity)
    assert flow.loss(models, given, CPU).total == 0
    torch.testing.assert_close(seen[0], (1 - s) * given.latents + s * (draws.noise + draws.extra))


@pytest.mark.ledger("KS-42")
def test_a_small_mask_does_not_weaken_the_step(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean is over the mask: an error of 1 everywhere costs 1, whatever the mask's size; outside it nothing counts."""
    given, flow = batch(), objective()
    draws = flow.draws(given.latents, given)
    small = torch.zeros(2, 1, 4, 4)
    small[..., 0, 0] = 1

    def loss(error: Tensor, mask: Tensor | None) -> float:
        monkeypatch.setattr("fluxsmith.train.objectives.flow.velocity", lambda *args, **options: draws.noise - given.latents + error)
        return float(flow.loss(models, given._replace(mask=mask), CPU).total)

    everywhere = torch.ones(2, 16, 4, 4)
    assert loss(everywhere, small) == pytest.approx(loss(everywhere, None), rel=1e-5)
    assert loss(everywhere * (1 - small), small) == pytest.approx(0, abs=1e-6)


@pytest.mark.ledger("KS-18")
@pytest.mark.parametrize("prediction", ["raw", "additive", "sigma_scaled"])
def test_preserved_samples_are_trained_towards_the_base(models: Models, prediction: str) -> None:
    """While the adapter does nothing their loss is zero; afterwards it is the distance from the base, whatever the picture."""
    base = models.dit
    assert base is not None
    layer = base.double_blocks[0].img_attn.proj

    class Shift(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y + amount

    class Switch:
        @contextmanager
        def disabled(self) -> Iterator[None]:
            nonlocal amount
            kept, amount = amount, 0.0
            yield
            amount = kept

    amount = 0.0
    layer.adapters["test"] = Shift()
    try:
        own = Models(dit=base, adapters=Switch())
        flow = objective({"prediction": prediction})
        given = batch(preserve=torch.tensor([True, False]))
        quiet = flow.loss(own, given, CPU)
        assert quiet.per_sample[0] == 0
        assert quiet.per_sample[1] > 0
        amount = 0.5
        moved = flow.loss(own, given, CPU)
        assert moved.per_sample[0] > 0
        with pytest.raises(ValueError, match="no adapter"):
            flow.loss(models, given, CPU)
    finally:
        del layer.adapters["test"]


def test_the_snr_threshold_has_the_same_ends() -> None:
    """c + (1 - c) (1 - s)^2 = (1 - c) / (1 + s / (1 - s))^2 + c, as DDPM trainers have it with their ratio of noise to picture."""
    config = Config(type="flow", huber_c=0.1, huber_schedule="snr")
    s = torch.tensor([0.0, 0.25, 0.5, 0.999])
    torch.testing.assert_close(threshold(config, s), 0.9 / (1 + s / (1 - s)) ** 2 + 0.1)
    torch.testing.assert_close(threshold(config, torch.tensor([1.0])), torch.tensor([0.1]))
