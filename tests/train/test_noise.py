"""Draws are keyed by the sample: the same in any batch; noise levels and guidance stay in their ranges and have their distributions."""

from typing import Any

import pytest
import torch

from fluxsmith.config.schema import NoiseConfig
from fluxsmith.train.noise import draw, loss_weight, noisy_input, prediction, sample_sigmas, sigma_table

SHAPE = (16, 4, 6)
SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift", "beta")


def config(**options: Any) -> NoiseConfig:
    return NoiseConfig(**options)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_draws_do_not_depend_on_the_batch(sampling: str) -> None:
    whole = draw(config(sampling=sampling, guidance=(1.0, 4.0)), 3, [5, 900, 17], SHAPE)
    for place, index in enumerate((5, 900, 17)):
        alone = draw(config(sampling=sampling, guidance=(1.0, 4.0)), 3, [index], SHAPE)
        for together, single in zip(whole[:3], alone[:3], strict=True):
            assert torch.equal(together[place], single[0])
        assert whole.extra is None


@pytest.mark.ledger("KS-29")
def test_input_noise_is_extra_and_leaves_the_other_draws_alone() -> None:
    plain, fixed = draw(config(), 3, [5, 6, 7], SHAPE), draw(config(input_noise=0.5), 3, [5, 6, 7], SHAPE)
    assert fixed.extra is not None
    assert torch.equal(plain.noise, fixed.noise)
    assert torch.equal(plain.sigma, fixed.sigma)
    assert fixed.extra.std() == pytest.approx(0.5, rel=0.1)
    assert abs(float((fixed.extra * fixed.noise).mean())) < 0.05
    varied = draw(config(input_noise=0.5, input_noise_random=True), 3, range(200), (1, 8, 8)).extra
    assert varied is not None
    strengths = varied.flatten(1).std(dim=1)
    assert strengths.min() < 0.1
    assert 0.4 < strengths.max() < 0.75
    assert strengths.mean() == pytest.approx(0.25, abs=0.05)


def test_draws_differ_by_sample_and_seed() -> None:
    drawn = [draw(config(), seed, [index], SHAPE) for seed in (1, 2) for index in (1, 2)]
    assert len({float(d.sigma) for d in drawn}) == 4
    assert len({float(d.noise.flatten()[0]) for d in drawn}) == 4


def test_one_kind_of_draw_does_not_disturb_another() -> None:
    """A range of guidance or another sampling leaves the noise as it was."""
    plain, other = draw(config(), 1, [7], SHAPE), draw(config(guidance=(1.0, 9.0), sampling="uniform"), 1, [7], SHAPE)
    assert torch.equal(plain.noise, other.noise)


@pytest.mark.ledger("KS-16")
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_levels_stay_in_their_range(sampling: str) -> None:
    drawn = draw(config(sampling=sampling, min_sigma=0.3, max_sigma=0.6), 0, range(400), (16, 2, 2))
    assert drawn.sigma.min() >= 0.3
    assert drawn.sigma.max() <= 0.6
    assert drawn.sigma.max() - drawn.sigma.min() > 0.15
    whole = draw(config(sampling=sampling), 0, range(400), (16, 2, 2)).sigma
    torch.testing.assert_close(drawn.sigma, 0.3 + 0.3 * whole)


@pytest.mark.ledger("KS-16")
def test_distributions() -> None:
    u, z = torch.rand(20_000), torch.randn(20_000)
    assert sample_sigmas(config(sampling="uniform"), u, z, 64).mean() == pytest.approx(0.5, abs=0.01)
    sigmoid = sample_sigmas(config(sampling="sigmoid", sigmoid_scale=2.0), u, z, 64)
    torch.testing.assert_close(sigmoid, torch.sigmoid(2 * z))
    shifted = sample_sigmas(config(sampling="shift", shift=3.0), u, z, 64)
    torch.testing.assert_close(shifted, 3 * torch.sigmoid(z) / (1 + 2 * torch.sigmoid(z)))
    small, large = (sample_sigmas(config(sampling="flux_shift"), u, z, tokens).mean() for tokens in (256, 4096))
    assert large > small + 0.05, "large pictures are trained at more noise"


def test_the_last_entry_of_the_table_is_reached_and_not_passed() -> None:
    u = torch.tensor([0.0, 0.5, 0.99999994, 1.0])
    sigma = sample_sigmas(config(sampling="sigma", shift=1.0), u, torch.zeros(4), 64)
    torch.testing.assert_close(sigma, torch.tensor([1.0, 0.5, 0.001, 0.001]))
    assert sigma_table(3.0)[0] == 1


@pytest.mark.ledger("KS-15")
def test_guidance() -> None:
    fixed = draw(config(guidance=3.5), 0, range(10), (16, 2, 2)).guidance
    assert torch.equal(fixed, torch.full((10,), 3.5))
    drawn = draw(config(guidance=(1.0, 5.0)), 0, range(500), (16, 2, 2)).guidance
    assert 1 <= drawn.min() < 1.2
    assert 4.8 < drawn.max() <= 5
    assert drawn.mean() == pytest.approx(3, abs=0.2)


@pytest.mark.ledger("KS-18")
def test_predictions_and_their_weights() -> None:
    output, noisy, sigma = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4), torch.tensor([0.25, 0.5])
    s = sigma.view(2, 1, 1, 1)
    assert torch.equal(prediction(config(), output, noisy, sigma), output)
    assert torch.equal(prediction(config(prediction="additive"), output, noisy, sigma), output + noisy)
    scaled = config(prediction="sigma_scaled")
    torch.testing.assert_close(prediction(scaled, output, noisy, sigma), noisy - s * output)
    assert loss_weight(config(weighting="sigma_sqrt"), sigma) is None
    weight = loss_weight(config(prediction="sigma_scaled", weighting="sigma_sqrt"), sigma)
    torch.testing.assert_close(weight, torch.tensor([16.0, 4.0]))
    assert loss_weight(scaled, sigma) is None


def test_the_straight_line() -> None:
    clean, noise = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    assert torch.equal(noisy_input(clean, noise, torch.zeros(2)), clean)
    assert torch.equal(noisy_input(clean, noise, torch.ones(2)), noise)
    torch.testing.assert_close(noisy_input(clean, noise, torch.full((2,), 0.25)), 0.75 * clean + 0.25 * noise)


@pytest.mark.ledger("ST-14")
def test_bell_beta_shift_and_custom_levels() -> None:
    """The sampling kinds of a flow schedule: where the levels fall, and that they are keyed by the sample."""
    indices = list(range(400))

    def levels(**options: Any) -> torch.Tensor:
        return draw(config(**options), 1, indices, (1, 2, 2)).sigma

    bell, shifted = levels(sampling="sigmoid"), levels(sampling="shift", shift=3.0)
    assert abs(bell.mean() - 0.5) < 0.03
    assert torch.allclose(shifted, 3 * bell / (1 + 2 * bell))
    small, large = (draw(config(sampling="sigmoid", auto_shift=True), 1, indices, (1, side, side)).sigma for side in (32, 128))
    assert small.mean() < large.mean()
    high, low = levels(sampling="beta", beta=(5.0, 2.0)), levels(sampling="beta", beta=(2.0, 5.0))
    assert abs(high.mean() - 5 / 7) < 0.03
    assert abs(low.mean() - 2 / 7) < 0.03
    custom = levels(sampling="custom", custom=(0.25, 0.5, 1.0))
    assert {round(float(level), 2) for level in custom} == {0.25, 0.5, 1.0}
    assert abs((custom == 0.25).float().mean() - 1 / 3) < 0.08
