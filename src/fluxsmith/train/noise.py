"""Noise levels, noisy inputs, targets and loss weights of rectified-flow training.

x_s = (1 - s) x + s e with target e - x; s in (0, 1] is drawn per sample from a generator keyed by the sample's
global index. Formulas: Esser et al. 2024 sections 2-3; names and tables as sd-scripts has them, see docs/explanation.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fluxsmith.config.schema import NoiseConfig
from fluxsmith.models.shift import apply_shift, shift_for_tokens
from fluxsmith.randomness import generator, python_random

TABLE = 1000  # discrete levels of `sampling = "sigma"`


class Draws(NamedTuple):
    """Everything random about a batch, on the host in fp32."""

    sigma: Tensor  # (B,)
    noise: Tensor  # like the latents
    guidance: Tensor  # (B,)
    extra: Tensor | None = None  # like the noise: added to the model's input, not to the target


def draw(config: NoiseConfig, seed: int, indices: Sequence[int], shape: Sequence[int]) -> Draws:
    """Draws for samples with these global indices; `shape` is (C, h, w) of one latent."""
    u, z, g, noise = [], [], [], []
    for index in indices:
        keyed = generator(seed, "timestep", index)
        u.append(beta_draw(config, seed, index) if config.sampling == "beta" else torch.rand((), generator=keyed))
        z.append(torch.randn((), generator=keyed))
        g.append(torch.rand((), generator=keyed))
        noise.append(torch.randn(tuple(shape), generator=generator(seed, "noise", index)))
    tokens = (shape[-2] // 2) * (shape[-1] // 2)
    sigma = sample_sigmas(config, torch.stack(u), torch.stack(z), tokens)
    extra = torch.stack([input_noise(config, seed, index, shape) for index in indices]) if config.input_noise else None
    return Draws(sigma, torch.stack(noise), draw_guidance(config, torch.stack(g)), extra)


def input_noise(config: NoiseConfig, seed: int, index: int, shape: Sequence[int]) -> Tensor:
    """gamma e2 with its own draws: input perturbation (Ning et al. 2023, eq. 9); gamma is fixed, or uniform between 0 and it."""
    keyed = generator(seed, "input_noise", index)
    gamma = config.input_noise * (float(torch.rand((), generator=keyed)) if config.input_noise_random else 1.0)
    return gamma * torch.randn(tuple(shape), generator=keyed)


def beta_draw(config: NoiseConfig, seed: int, index: int) -> Tensor:
    """A beta-distributed draw in fp32, 0-dim."""
    return torch.tensor(python_random(seed, "timestep", index).betavariate(*config.beta))


def draw_guidance(config: NoiseConfig, u: Tensor) -> Tensor:
    """Guidance input per sample: constant, or uniform between two bounds."""
    if isinstance(config.guidance, tuple):
        low, high = config.guidance
        return low + (high - low) * u
    return torch.full_like(u, config.guidance)


def sample_sigmas(config: NoiseConfig, u: Tensor, z: Tensor, tokens: int) -> Tensor:
    """Noise levels from unit-uniform draws u and unit-normal draws z, (B,) each.

    sigma: index floor(1000 density(u)) into the shifted table, which runs from noise to picture; uniform: u;
    sigmoid: sigmoid(scale z); shift and flux_shift: the same, shifted by `shift` or by the picture's size; beta: u, which was
    drawn from that distribution; custom: one of the given levels.
    """
    if config.sampling == "custom":
        levels = torch.tensor(config.custom)
        return levels[(u * len(levels)).long().clamp(max=len(levels) - 1)]
    if config.sampling == "sigma":
        index = (density(config, u, z) * TABLE).long().clamp(max=TABLE - 1)
        sigma = sigma_table(config.shift)[index]
    else:
        sigma = u if config.sampling in ("uniform", "beta") else torch.sigmoid(config.sigmoid_scale * z)
        if config.sampling == "flux_shift" or config.auto_shift:
            sigma = apply_shift(sigma, shift_for_tokens(tokens))
        elif config.sampling == "shift":
            sigma = apply_shift(sigma, config.shift)
    return config.min_sigma + (config.max_sigma - config.min_sigma) * sigma


def density(config: NoiseConfig, u: Tensor, z: Tensor) -> Tensor:
    """Where in the table a draw falls: uniform, logit-normal, or "mode" with heavy tails (Esser et al. 2024, eq. 19-20)."""
    if config.weighting == "logit_normal":
        return torch.sigmoid(config.logit_mean + config.logit_std * z)
    if config.weighting == "mode":
        return 1 - u - config.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return u


def sigma_table(shift: float) -> Tensor:
    """1000 levels from 1 downwards: the shifted j/1000 for j = 1000..1, (1000,) fp32."""
    return apply_shift(torch.arange(TABLE, 0, -1, dtype=torch.float32) / TABLE, shift)


def noisy_input(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - s) x + s e; clean and noise (B, C, h, w), sigma (B,)."""
    s = sigma.view(-1, *[1] * (clean.dim() - 1))
    return (1 - s) * clean + s * noise


def prediction(config: NoiseConfig, output: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """What is compared with the target: raw v; additive v + x_s; sigma_scaled x_s - s v."""
    if config.prediction == "raw":
        return output
    if config.prediction == "additive":
        return output + noisy
    return noisy - sigma.view(-1, *[1] * (output.dim() - 1)) * output


def loss_weight(config: NoiseConfig, sigma: Tensor) -> Tensor | None:
    """Weight per sample, only with sigma_scaled: 1/s^2 (sigma_sqrt) or 2/(pi (1 - 2s + 2s^2)) (cosmap)."""
    if config.prediction != "sigma_scaled":
        return None
    if config.weighting == "sigma_sqrt":
        return sigma**-2.0
    if config.weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return None
