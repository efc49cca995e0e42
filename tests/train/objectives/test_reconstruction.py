"""Training an autoencoder: the distance by its formula, what it needs, and that pictures come back better."""

import pytest
import torch
from ran import Go

from fluxsmith.config.schema import NoiseConfig
from fluxsmith.data.types import Batch
from fluxsmith.models.assembly import Models
from fluxsmith.models.tiny_autoencoder import TinyAutoEncoder, TinyAutoEncoderParams
from fluxsmith.train.objectives.reconstruction import Config, spread

CPU = torch.device("cpu")


@torch.no_grad()
def test_the_distance() -> None:
    torch.manual_seed(0)
    ae = TinyAutoEncoder(TinyAutoEncoderParams(8, 16, (1, 1, 1, 1), (1, 1, 1, 1)))
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    config = Config(type="reconstruction", l1=0.3, edges=0.2, latent_noise=0.0, latent_penalty=0.05, latent_spread=0.01)
    batch = Batch(("a", "b"), (0, 1), ("", ""), None, pixels, None, torch.tensor([1.0, 2.0]))
    loss = config.build(NoiseConfig(), 0).loss(Models(ae=ae), batch, CPU)
    latents = ae.encode(pixels)
    d = ae.decode(latents) - pixels
    edges = sum(d.diff(dim=axis).abs().mean(dim=(1, 2, 3)) for axis in (-1, -2))
    expected = d.square().mean(dim=(1, 2, 3)) + 0.3 * d.abs().mean(dim=(1, 2, 3)) + 0.2 * edges
    expected = (expected + 0.05 * (latents**2 - 1).relu().mean(dim=(1, 2, 3))) * torch.tensor([1.0, 2.0])
    torch.testing.assert_close(loss.per_sample, expected)
    torch.testing.assert_close(loss.total, expected.mean() + 0.01 * spread(latents))


def test_spread_is_zero_for_unit_channels() -> None:
    latents = torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert spread(latents) < 1e-3
    torch.testing.assert_close(spread(latents * 3 + 2), torch.tensor(4.0 + 4.0), rtol=0.02, atol=0)


def test_what_it_needs() -> None:
    objective = Config(type="reconstruction").build(NoiseConfig(), 0)
    with pytest.raises(ValueError, match="autoencoder"):
        objective.loss(Models(), Batch((), (), (), None, None, None, torch.ones(0)), CPU)


def test_pictures_come_back_better(go: Go) -> None:
    changes = {
        "objective": {"type": "reconstruction"},
        "train.components": ["ae"],
        "cache.latents": "off",
        "train.steps": 40,
        "optim.lr": 2e-3,
    }
    ran = go(changes)
    assert ran.error is None
    losses = [float.fromhex(loss) for loss in ran.losses]
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    assert {name.split(".")[0] for name in ran.weights} == {"ae"}
