"""Rectified flow: the model's velocity against noise - clean (Lipman et al. 2023; Esser et al. 2024).

`objective = { type = "flow", loss = "l2" }`. The step is a pure function of weights, batch and draws.
"""

from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from fluxsmith.config.schema import NoiseConfig
from fluxsmith.config.section import PluginConfig
from fluxsmith.data.types import Batch, TextStates
from fluxsmith.models.assembly import Level, Models, velocity
from fluxsmith.train.noise import Draws, draw, loss_weight, noisy_input, prediction
from fluxsmith.train.step import Loss, reduce_loss


class Config(PluginConfig):
    """Velocity matching."""

    loss: Literal["l2", "l1", "huber", "smooth_l1"] = "l2"
    """Distance between prediction and target."""
    huber_c: PositiveFloat = 0.1
    """Where huber and smooth_l1 turn from square to absolute."""
    huber_scale: PositiveFloat = 1.0
    """Factor on the threshold."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "constant"
    """exponential: the threshold is scale * c^t, so it falls from 1 at t = 0 to c at pure noise. snr: the same ends by the ratio of noise
    to picture s / (1 - s), scale * (c + (1 - c) (1 - s)^2)."""

    def build(self, noise: NoiseConfig, seed: int) -> "Flow":
        """The objective."""
        return Flow(self, noise, seed)


class Flow:
    """Needs the DiT, and text either from the batch or from live encoders."""

    components = ("dit",)
    wants_latents = True

    def __init__(self, config: Config, noise: NoiseConfig, seed: int) -> None:
        self.config = config
        self.noise = noise
        self.seed = seed

    def draws(self, latents: Tensor, batch: Batch) -> Draws:
        """The random part of a batch, fixed by seed and sample indices."""
        return draw(self.noise, self.seed, batch.indices, latents.shape[1:])

    def loss(self, models: Models, batch: Batch, device: torch.device) -> Loss:
        """Loss of one micro-batch."""
        latents = batch_latents(models, batch, device)
        return self.loss_at(models, latents, batch_text(models, batch, device), batch, self.draws(latents, batch))

    def loss_at(self, models: Models, latents: Tensor, text: TextStates, batch: Batch, draws: Draws) -> Loss:
        """The pure part: weights, latents (B, C, h, w), text and draws -> Loss."""
        dit = models.dit
        if dit is None:
            raise ValueError("the flow objective needs the DiT")
        device = latents.device
        sigma, noise = draws.sigma.to(device), draws.noise.to(device)
        noisy = noisy_input(latents, noise, sigma)
        if draws.extra is not None:  # on the input alone: the target is the velocity of the plain noise
            noisy = noisy_input(latents, noise + draws.extra.to(device), sigma)
        controls, level = models.conditioners(batch.condition), Level(sigma, draws.guidance.to(device))

        def predicted() -> Tensor:
            output = velocity(dit, noisy, text, level, mask_text=models.mask_text, controls=controls)
            return prediction(self.noise, output.float(), noisy, sigma)

        target = noise - latents
        if batch.preserve is not None:
            with torch.no_grad(), models.base_alone():
                kept = predicted()
            target = torch.where(batch.preserve.to(device).view(-1, 1, 1, 1), kept, target)
        difference = predicted() - target
        return reduce_loss(
            element_loss(self.config, difference, sigma),
            sigma=sigma,
            weight=loss_weight(self.noise, sigma),
            sample_weight=batch.weights.to(device),
            mask=None if batch.mask is None else batch.mask.to(device),
        )


def element_loss(config: Config, difference: Tensor, sigma: Tensor) -> Tensor:
    """Elementwise loss of a difference (B, C, h, w). huber: 2c (sqrt(d^2 + c^2) - c); smooth_l1: the same without the factor c."""
    if config.loss == "l2":
        return difference**2
    if config.loss == "l1":
        return difference.abs()
    c = threshold(config, sigma).view(-1, *[1] * (difference.dim() - 1))
    root = torch.sqrt(difference**2 + c**2) - c
    return 2 * c * root if config.loss == "huber" else 2 * root


def threshold(config: Config, sigma: Tensor) -> Tensor:
    """c per sample, (B,)."""
    if config.huber_schedule == "exponential":
        return config.huber_scale * config.huber_c**sigma
    if config.huber_schedule == "snr":
        return config.huber_scale * (config.huber_c + (1 - config.huber_c) * (1 - sigma) ** 2)
    return torch.full_like(sigma, config.huber_c * config.huber_scale)


def batch_latents(models: Models, batch: Batch, device: torch.device) -> Tensor:
    """Cached latents, or pixels encoded now (without gradient)."""
    if batch.latents is not None:
        return batch.latents.to(device, torch.float32)
    if batch.pixels is None or models.ae is None:
        raise ValueError("a batch needs latents, or pixels and an autoencoder")
    with torch.no_grad():
        return models.ae.encode(batch.pixels.to(device)).float()


def batch_text(models: Models, batch: Batch, device: torch.device) -> TextStates:
    """Cached text states, or captions encoded now (with gradient where an encoder is trained)."""
    dtype = torch.float32 if models.dit is None else models.dit.dtype
    if batch.text is None:
        return models.encode_text(batch.captions).to(device, dtype)
    return models.with_live_clip(batch.text.to(device, dtype), batch.captions).to(device, dtype)
