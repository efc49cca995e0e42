"""Guidance distillation: teach the guidance input what true CFG does, as FLUX.1-dev has it (Meng et al. 2023).

Target: v_u + g (v_c - v_u) of the frozen starting model, with g drawn from `noise.guidance = [low, high]` and given to
the student's guidance embedder. At g = 1 the student is the plain conditional model.
"""

import copy

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from fluxsmith.config.schema import NoiseConfig
from fluxsmith.config.section import PluginConfig
from fluxsmith.data.types import Batch, TextStates
from fluxsmith.errors import ConfigError
from fluxsmith.models.assembly import Level, Models, velocity
from fluxsmith.models.flux import FluxDiT
from fluxsmith.train.noise import draw, noisy_input
from fluxsmith.train.objectives.flow import batch_latents, batch_text
from fluxsmith.train.step import Loss, reduce_loss


class Config(PluginConfig):
    """Distil classifier-free guidance into the guidance embedder."""

    teacher_guidance: NonNegativeFloat = 1.0
    """Guidance input of the teacher: the value it was trained with."""

    def build(self, noise: NoiseConfig, seed: int) -> "GuidanceDistillation":
        """The objective; raises ConfigError unless `noise.guidance` is a range."""
        if not isinstance(noise.guidance, tuple):
            raise ConfigError("noise.guidance is one value", why="distillation draws it", fix="give a range, for example [1.0, 5.0]")
        return GuidanceDistillation(self, noise, seed)


class GuidanceDistillation:
    """Needs the DiT (whose starting weights become the teacher) and text encoders for the empty prompt."""

    components = ("dit",)
    wants_latents = True

    def __init__(self, config: Config, noise: NoiseConfig, seed: int) -> None:
        self.config = config
        self.noise = noise
        self.seed = seed
        self._teacher: FluxDiT | None = None
        self._mask_text = False

    def start(self, models: Models) -> None:
        """Keep the starting weights as the teacher; called once, before any resumed weights are loaded."""
        self._teacher, self._mask_text = copy.deepcopy(models.dit), models.mask_text
        if self._teacher is None or not self._teacher.params.guidance_embed:
            raise ConfigError("guidance distillation needs a model with a guidance embedder", fix="use a dev-shaped model")
        self._teacher.requires_grad_(False).eval()

    def loss(self, models: Models, batch: Batch, device: torch.device) -> Loss:
        """Loss of one micro-batch: squared distance to the guided teacher."""
        if models.dit is None or self._teacher is None:
            raise ValueError("start() must be called before loss()")
        latents = batch_latents(models, batch, device)
        text = batch_text(models, batch, device)
        draws = draw(self.noise, self.seed, batch.indices, latents.shape[1:])
        sigma, guidance = draws.sigma.to(device), draws.guidance.to(device)
        noisy = noisy_input(latents, draws.noise.to(device), sigma)
        with torch.no_grad():
            empty = models.encode_text([""]).to(device, text.txt.dtype)
            empty = TextStates(*(part.expand_as(like) for part, like in zip(empty, text, strict=True)))
            target = self._guided(self._teacher, noisy, (text, empty), sigma, guidance)
        output = velocity(models.dit, noisy, text, Level(sigma, guidance), mask_text=models.mask_text)
        return reduce_loss((output.float() - target) ** 2, sigma=sigma, weight=None, sample_weight=batch.weights.to(device))

    def _guided(self, teacher: FluxDiT, noisy: Tensor, texts: tuple[TextStates, TextStates], sigma: Tensor, guidance: Tensor) -> Tensor:
        fixed = torch.full_like(sigma, self.config.teacher_guidance)
        level, mask_text = Level(sigma, fixed), self._mask_text
        conditional, unconditional = (velocity(teacher, noisy, text, level, mask_text=mask_text).float() for text in texts)
        return unconditional + guidance.view(-1, 1, 1, 1) * (conditional - unconditional)
