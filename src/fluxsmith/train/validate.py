"""Looking at a run while it trains: pictures of the sample prompts, and the loss on held-out pictures.

Both have random streams of their own and leave no trace: with or without them the weights are the same bits.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from fluxsmith.config.choice import realise
from fluxsmith.config.schema import SampleConfig
from fluxsmith.controls.base import Control
from fluxsmith.errors import FluxsmithError
from fluxsmith.events import Bus, SampleReady, ValidationEnded, Warned
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.generate.request import Request
from fluxsmith.io.images import read_image, write_png
from fluxsmith.io.metadata import png_text
from fluxsmith.models.assembly import TextStates
from fluxsmith.randomness import generator
from fluxsmith.train.naming import sample_path
from fluxsmith.train.noise import Draws, draw_guidance
from fluxsmith.train.objectives.flow import Flow, batch_latents, batch_text
from fluxsmith.train.setup import Parts
from fluxsmith.train.update import evaluated


@contextmanager
def evaluation(parts: Parts) -> Iterator[None]:
    """Eval mode, no gradients, averaged weights if there are any, and the random state put back afterwards."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[parts.world.device] if parts.world.device.type == "cuda" else []))
        stack.enter_context(torch.no_grad())
        stack.callback(parts.trained.placement.publish)  # called last
        stack.enter_context(parts.ema.applied() if parts.ema is not None else evaluated(parts))
        stack.callback(parts.trained.placement.publish)  # called first: what is put back lies at rest
        parts.trained.placement.publish()
        parts.trained.train_mode(False)
        yield


class Sampler:
    """Draws the config's sample prompts; a failure is a warning, never the end of the run."""

    def __init__(self, parts: Parts, bus: Bus) -> None:
        self.parts = parts
        self.bus = bus
        takes_part = parts.world.is_main or parts.trained.placement.is_shared
        self.samples = parts.config.sample if takes_part else []

    def before_training(self) -> None:
        """The pictures everything is compared with."""
        self._draw([(index, sample) for index, sample in enumerate(self.samples) if sample.first], 0)

    def after(self, step: int, *, last: bool, only_missing: bool = False) -> None:
        """Pictures that are due after `step`; `only_missing` leaves alone what an earlier start drew."""
        plan = self.parts.plan
        due = [
            (index, s)
            for index, s in enumerate(self.samples)
            if (last and s.last) or (s.every and step % s.every == 0) or plan.is_epoch_due(step, s.every_epochs)
        ]
        if only_missing:
            due = [(i, s) for i, s in due if not all(self._path(i, s.seed + number, step).exists() for number in range(s.count))]
            if self.parts.trained.placement.is_shared:
                due = self.parts.world.share(due)
        self._draw(due, step)

    def _path(self, index: int, seed: int, step: int) -> Path:
        """Where a picture goes; one that was drawn already is found again under the name it has."""
        config, plan = self.parts.config, self.parts.plan
        if config.checkpoint.naming == "fluxsmith":
            return config.run.dir / "samples" / f"step-{step:06d}_p{index:02d}_s{seed}.png"
        by_epoch = plan.is_epoch_due(step, config.sample[index].every_epochs)
        return sample_path(config, f"e{plan.epochs_done(step):06d}" if by_epoch else f"{step:06d}", index, seed)

    def _draw(self, due: list[tuple[int, SampleConfig]], step: int) -> None:
        if not due:
            return
        with evaluation(self.parts):
            controls = [control for control in self.parts.models.controls if isinstance(control, Control)]
            pipeline = Pipeline(self.parts.models, realise(self.parts.config.model).sampling_defaults(), self._encode, controls=controls)
            for index, sample in due:
                for number in range(sample.count):
                    self._one(pipeline, (index, sample), sample.seed + number, step)

    def _encode(self, prompt: str) -> TextStates:
        ready, models = self.parts.prompts.get(prompt), self.parts.models
        return models.with_live_clip(ready, [prompt]) if ready is not None else models.encode_text([prompt])

    def _one(self, pipeline: Pipeline, entry: tuple[int, SampleConfig], seed: int, step: int) -> None:
        index, sample = entry
        path = self._path(index, seed, step)
        begun = time.monotonic()
        try:
            request = Request(
                sample.prompt, sample.negative, sample.width, sample.height, sample.steps, sample.guidance, sample.cfg,
                seed, control_image=read_image(sample.control_image).image if sample.control_image else None,
            )  # fmt: skip
            picture = pipeline.generate(request)
            if not self.parts.world.is_main:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(path, picture.image, png_text({**picture.settings, "step": step}))
        except (FluxsmithError, RuntimeError, OSError) as error:
            self.bus.send(Warned(f"sample {index} failed at step {step}: {error}"))
            return
        self.bus.send(SampleReady(step, index, sample.prompt, str(path), time.monotonic() - begun))


class Validator:
    """Mean loss of held-out batches at fixed noise levels, with fixed noise."""

    def __init__(self, parts: Parts, bus: Bus) -> None:
        self.parts = parts
        self.bus = bus

    def after(self, step: int, *, last: bool) -> None:
        """Measure if due."""
        settings = self.parts.config.validation
        by_epoch = self.parts.plan.is_epoch_due(step, settings.every_epochs)
        is_on = settings.every > 0 or settings.every_epochs > 0
        takes_part = self.parts.world.is_main or self.parts.trained.placement.is_shared
        if is_on and (last or by_epoch or (settings.every and step % settings.every == 0)) and takes_part:
            by_level = {f"{sigma:g}": self.loss_at(sigma) for sigma in settings.sigmas}
            self.bus.send(ValidationEnded(step, sum(by_level.values()) / len(by_level), by_level))

    def loss_at(self, sigma: float) -> float:
        """Mean loss of all held-out samples at one noise level."""
        parts, objective = self.parts, self.parts.objective
        if not isinstance(objective, Flow):
            raise FluxsmithError("validation loss needs the flow objective", fix="set validation.every = 0")
        total, count = 0.0, 0
        with evaluation(parts):
            for spec in parts.data.validation_batches():
                batch = parts.data.load(spec, step=0)
                latents = batch_latents(parts.models, batch, parts.world.device)
                seed = parts.config.validation.seed
                noise = torch.stack([torch.randn(latents.shape[1:], generator=generator(seed, "validation", key)) for key in batch.keys])
                levels = torch.full((len(batch.keys),), sigma)
                draws = Draws(levels, noise, draw_guidance(parts.config.noise, torch.full_like(levels, 0.5)))
                loss = objective.loss_at(parts.models, latents, batch_text(parts.models, batch, parts.world.device), batch, draws)
                total += float(loss.per_sample.sum())
                count += len(batch.keys)
        return total / max(1, count)
