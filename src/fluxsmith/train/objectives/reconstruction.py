"""Train a tiny autoencoder from pictures: the recipe of the bundled model's AE.

Squared and absolute error, absolute error of finite differences (edges), noise on the latent so that it is robust, and a
penalty on latents beyond unit size, because the tiny form's latents are the model-side ones (std about 1).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor

from fluxsmith.config.schema import NoiseConfig
from fluxsmith.config.section import PluginConfig
from fluxsmith.data.types import Batch
from fluxsmith.models.assembly import Models
from fluxsmith.randomness import generator
from fluxsmith.train.step import Loss


class Config(PluginConfig):
    """Picture in, picture out."""

    parts: Literal["all", "decoder"] = "all"
    """What learns; with the decoder alone the latents stay what they are, so models trained on them still fit."""
    l1: NonNegativeFloat = 0.1
    """Weight of the absolute error."""
    edges: NonNegativeFloat = 0.1
    """Weight of the absolute error of horizontal and vertical differences."""
    latent_noise: NonNegativeFloat = 0.05
    """Standard deviation of noise added to the latents before decoding."""
    latent_penalty: NonNegativeFloat = 1e-4
    """Weight of relu(z^2 - 1)."""
    latent_spread: NonNegativeFloat = 1e-2
    """Weight of the distance of each latent channel's mean from 0 and standard deviation from 1 (what a flow model likes)."""

    def build(self, noise: NoiseConfig, seed: int) -> "Reconstruction":
        """The objective; `noise` is not used, pictures have no noise level here."""
        return Reconstruction(self, seed)


class Reconstruction:
    """Needs the autoencoder and pixels (`cache.latents = "off"`)."""

    components = ("ae",)
    wants_latents = False

    def __init__(self, config: Config, seed: int) -> None:
        self.config = config
        self.seed = seed

    def loss(self, models: Models, batch: Batch, device: torch.device) -> Loss:
        """Loss of one micro-batch."""
        if models.ae is None or batch.pixels is None:
            raise ValueError("the reconstruction objective needs the autoencoder and pixels")
        pixels = batch.pixels.to(device)
        latents = models.ae.encode(pixels)
        if self.config.parts == "decoder":
            latents = latents.detach()
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator(self.seed, "noise", i)) for i in batch.indices])
        decoded = models.ae.decode(latents + self.config.latent_noise * noise.to(device))
        per_sample = self._distance(decoded, pixels) + self.config.latent_penalty * F.relu(latents**2 - 1).flatten(1).mean(dim=1)
        per_sample = per_sample * batch.weights.to(device)
        total = per_sample.mean() + self.config.latent_spread * spread(latents)
        return Loss(total, per_sample.detach(), torch.empty(0))

    def _distance(self, decoded: Tensor, pixels: Tensor) -> Tensor:
        difference = decoded - pixels
        total = (difference**2).flatten(1).mean(dim=1) + self.config.l1 * difference.abs().flatten(1).mean(dim=1)
        for axis in (-1, -2):
            total = total + self.config.edges * difference.diff(dim=axis).abs().flatten(1).mean(dim=1)
        return total


def spread(latents: Tensor) -> Tensor:
    """Mean over channels of mean^2 + (std - 1)^2, both over batch and positions: (B, C, h, w) -> 0-dim."""
    channels = latents.transpose(0, 1).flatten(1)
    return (channels.mean(dim=1) ** 2 + (channels.std(dim=1) - 1) ** 2).mean()
