"""The loop: build, resume, step, save, sample, stop cleanly. One optimizer step at a time, everything else around it.

Order inside a step: loss and gradient finite? -> clip -> optimizer -> EMA -> count -> log -> save -> samples.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fluxsmith.config.dump import to_toml
from fluxsmith.config.schema import RunConfig, as_plain
from fluxsmith.errors import ConfigError, ModelFileError, NumericError, StopRequested
from fluxsmith.events import Bus, CheckpointSaved, PhaseStarted, RunEnded, RunStarted, StepEnded, Warned
from fluxsmith.io.durable import Disk
from fluxsmith.randomness import seed_device, seed_for
from fluxsmith.train.checkpoint import Sharing, State, StateFolder, read_extra, read_state, restore
from fluxsmith.train.export import export_weights
from fluxsmith.train.identity import check_identity, identity_of, machine_facts
from fluxsmith.train.metrics import Metrics
from fluxsmith.train.naming import Naming
from fluxsmith.train.precision import Precision, peak_bytes
from fluxsmith.train.setup import Parts
from fluxsmith.train.stop import StopSwitch
from fluxsmith.train.update import FusedUpdate, Update
from fluxsmith.train.validate import Sampler, Validator

Seen = list[tuple[Sequence[str], Tensor]]  # keys of each micro-batch and its noise levels
MAX_SKIPPED = 3  # non-finite steps in a row that `nonfinite = "skip_step"` forgives


class StepResult(NamedTuple):
    """What one optimizer step measured."""

    loss: float
    grad_norm: float
    lr: float
    skipped: bool
    extras: dict[str, float]


class Trainer:
    """One run on built parts."""

    def __init__(self, parts: Parts, bus: Bus, disk: Disk) -> None:
        self.parts = parts
        self.bus = bus
        self.disk = disk
        self.config = parts.config
        self.run_dir = parts.config.run.dir
        placement = parts.trained.placement
        whole = parts.config.distributed.checkpoint == "full"
        self.states = StateFolder(self.run_dir / "state", disk, Sharing(parts.world, placement, whole) if placement.spans else None)
        self.takes_part = parts.world.is_main or bool(placement.spans)  # in saving and exporting
        if parts.trained.adapters is not None:
            self.states.extra = parts.trained.adapters.extra
        self.metrics = Metrics(self.run_dir / "metrics.jsonl", disk)
        self.precision = Precision(parts.config.train.precision, parts.world.device)
        self.update = (FusedUpdate if parts.config.memory.fused_update != "off" else Update)(parts, self.precision)
        facts = {**parts.facts, **machine_facts(parts.world.device)}
        self.identity, self.schedule = identity_of(parts.config, facts)
        self.naming = Naming(parts.config, parts.plan, parts.total_steps, disk)
        self.step = 0
        self.exact_from: int | None = None
        self.skipped_in_row = 0
        self.sampler = Sampler(parts, bus)
        self.validator = Validator(parts, bus)

    # ---- the loop -----------------------------------------------------------------------------------------------

    def run(self, allow_change: Sequence[str] = ()) -> Path:
        """Train to the end; returns the final weights file. Raises StopRequested after a stop with a checkpoint."""
        begun = time.monotonic()
        self._resume(allow_change)
        total = self.parts.total_steps
        facts = {**self.parts.facts, **machine_facts(self.parts.world.device)}
        facts |= {"epoch_batches": self.parts.plan.per_epoch, "trained": self._trained_count()}
        self.bus.send(RunStarted(str(self.run_dir), total, self.step, as_plain(self.config), facts))
        lack = self.states.lack_of_space(self.parts.trained.params, self.parts.ema, self.config.checkpoint.keep)
        if lack and self.parts.world.is_main:
            self.bus.send(Warned(lack))
        if self.config.train.dry_step and self.step < total:
            self._dry_step()
        if self.step == 0:
            self.sampler.before_training()
        else:
            self._catch_up()
        with StopSwitch(self.run_dir) as switch:
            while self.step < total:
                self._one_step()
                stopping = self.parts.world.any(switch.requested)
                self._after_step(stopping)
                if stopping:
                    self.bus.send(RunEnded(self.step, stopped=True, seconds=time.monotonic() - begun))
                    raise StopRequested(
                        f"stopped by {switch.by or 'another process'} after step {self.step}, the state is saved",
                        where=str(self.run_dir), fix="continue with the same command and --resume",
                    )  # fmt: skip
        weights = export_weights(self.parts, self.naming.final, self.step, self.disk, self.bus)
        self.bus.send(RunEnded(self.step, stopped=False, seconds=time.monotonic() - begun, weights=str(weights)))
        return weights

    def _one_step(self) -> None:
        begun = time.monotonic()
        result = self._optimizer_step()
        self.step += 1
        if self.parts.world.is_main:
            self.metrics.add(self.step, result.loss, result.lr, result.grad_norm)
        epoch = self.parts.plan.epoch_of(self.step - 1) + 1
        seconds = time.monotonic() - begun
        peak = peak_bytes(self.parts.world.device)
        self.bus.send(StepEnded(self.step, epoch, result.loss, result.lr, result.grad_norm, seconds, peak, result.extras))

    def _after_step(self, stopping: bool) -> None:
        last = self.step == self.parts.total_steps
        due = self._checkpoint_due()
        if (due or stopping or last) and self.takes_part:
            self._save()
            self._export(self.naming.paths(self.step))
        if not stopping:
            self.validator.after(self.step, last=last)
            self.sampler.after(self.step, last=last)

    def _catch_up(self) -> None:
        """What a kill between a state and the files that follow it left undone."""
        last = self.step == self.parts.total_steps
        if self.parts.world.is_main:
            self.states.retire(self.step, self.config.checkpoint.keep)
        self._export(self.parts.world.share([path for path in self.naming.paths(self.step) if not path.exists()]))
        self.sampler.after(self.step, last=last, only_missing=True)

    def _export(self, paths: Sequence[Path]) -> None:
        if not self.takes_part:
            return
        for path in paths:
            export_weights(self.parts, path, self.step, self.disk, self.bus)
        if self.parts.world.is_main and paths:
            self.naming.retire_weights()

    def _checkpoint_due(self) -> bool:
        settings = self.config.checkpoint
        by_epoch = self.parts.plan.is_epoch_due(self.step, settings.every_epochs)
        return by_epoch or (settings.every > 0 and self.step % settings.every == 0)

    # ---- one optimizer step -------------------------------------------------------------------------------------

    def _optimizer_step(self) -> StepResult:
        parts, world = self.parts, self.parts.world
        parts.trained.train_mode(True)
        self.update.begin(self.step)
        if parts.refill is not None:
            with self.precision.autocast():
                parts.refill(self.step, parts.plan, parts.total_steps)
        loss, seen = self._gradients(self.step)  # its value was read: the device is done, so the next question costs nothing
        if parts.refill is not None:
            parts.refill.confirm()
        loss = float(world.mean(torch.tensor(loss, dtype=torch.float64)).item()) if world.size > 1 else loss
        grad_norm, extras = self.update.ready(), {}
        skipped = not self._is_finite(loss, grad_norm, seen)
        seed_device(world.device, seed_for(self.config.train.seed, "optimizer", self.step))  # stochastic rounding
        if not skipped:
            extras = self.update.apply()
            if parts.ema is not None:
                parts.ema.update(self.step)
        else:
            self.precision.skip()
            parts.trained.placement.publish()
        return StepResult(loss, grad_norm, self.update.rate(), skipped, extras)

    def _gradients(self, step: int) -> tuple[float, Seen]:
        """Backward over this process's micro-batches; mean loss, and what each batch was, for messages.

        The host waits for the device once, when all of it is on its way; a fused update must know each loss before its backward pass.
        """
        parts, device = self.parts, self.parts.world.device
        micro_batches = parts.plan.micro_batches(step, parts.world.rank)
        losses: list[Tensor] = []
        seen: Seen = []
        for number, spec in micro_batches:
            batch = parts.data.load(spec, step=step, total_steps=parts.total_steps)
            seed_device(device, seed_for(self.config.train.seed, "dropout", number))  # dropout inside adapters
            with self.precision.autocast():
                loss = parts.objective.loss(parts.models, batch, device)
            seen.append((batch.keys, loss.sigma))
            losses.append(loss.total.detach())
            if self.update.is_fused and not math.isfinite(loss.total.item()):
                break  # its backward pass would touch the weights
            self.precision.backward(loss.total / len(micro_batches))
        return sum(value / len(micro_batches) for value in torch.stack(losses).tolist()), seen

    def _is_finite(self, loss: float, grad_norm: float, seen: Seen) -> bool:
        values = torch.tensor([loss, grad_norm])
        if bool(values.isfinite().all()) or self.precision.forgives(loss):
            self.skipped_in_row = 0
            return bool(values.isfinite().all())
        self.skipped_in_row += 1
        samples = [f"{', '.join(keys)} at noise level {[round(s, 4) for s in sigma.tolist()]}" for keys, sigma in seen]
        if self.config.train.nonfinite == "skip_step" and self.skipped_in_row <= MAX_SKIPPED:
            self.bus.send(Warned(f"step {self.step + 1} skipped: loss {loss}, gradient norm {grad_norm}; samples: {'; '.join(samples)}"))
            return False
        layer = next((name for name, p in self.parts.trained.params.items() if p.grad is not None and not p.grad.isfinite().all()), "none")
        raise NumericError(
            f"loss {loss}, gradient norm {grad_norm} at step {self.step + 1}; the weights were not touched",
            where=str(self.run_dir),
            why=f"samples: {'; '.join(samples)}; first layer with a non-finite gradient: {layer}",
            fix="lower optim.lr, use train.precision = bf16 instead of fp16, or look at these pictures; then --resume",
        )

    def _dry_step(self) -> None:
        """The largest batch forward and backward once: lack of memory shows now and not in the middle of the night."""
        self.bus.send(PhaseStarted("dry step", "largest bucket"))
        batch = self.parts.data.load(self.parts.data.largest(), step=0)
        with self.precision.autocast():
            loss = self.parts.objective.loss(self.parts.models, batch, self.parts.world.device)
        loss.total.backward()
        self.parts.trained.zero_grad()

    # ---- states -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        begun = time.monotonic()
        self._refuse_nonfinite()
        if self.parts.world.is_main:
            self.metrics.sync()
        state = State(
            self.step, self.metrics.size, self.identity, self.schedule, self.exact_from, self.skipped_in_row, self.precision.state()
        )
        path = self.states.save(state, self.parts.trained.params, self.parts.optimizer, self.parts.ema, keep=self.config.checkpoint.keep)
        if self.parts.world.is_main:
            self.naming.publish_state(path, self.step)
        seconds = time.monotonic() - begun
        self.bus.send(CheckpointSaved(self.step, str(path), seconds))
        if seconds > self.config.run.grace_seconds:
            grace = f"run.grace_seconds = {self.config.run.grace_seconds:g}"
            self.bus.send(Warned(f"saving took {seconds:.0f} s, longer than {grace}: a stop signal may not leave time for a state"))

    def _refuse_nonfinite(self) -> None:
        bad = [name for name, param in self.parts.trained.params.items() if not bool(param.isfinite().all())]
        if self.parts.world.any(bool(bad)) if self.parts.trained.placement.spans else bad:
            named = ", ".join(bad[:3]) or "in the share of another process"
            raise NumericError(
                f"{len(bad)} trained tensors hold NaN or infinity after step {self.step}: {named}; nothing was saved",
                where=str(self.run_dir), fix="resume from the last state with a lower optim.lr",
            )  # fmt: skip

    def _resume(self, allow_change: Sequence[str]) -> None:
        world = self.parts.world
        manifest, passed_over = world.share(self.states.newest() if world.is_main else None)
        for problem in passed_over:
            self.bus.send(Warned(f"state passed over: {problem}"))
        if manifest is None:
            if passed_over:
                raise ModelFileError("no state of this run is complete", problems=passed_over)
            if self.parts.world.is_main:
                self.metrics.rewind(0)
            self.step = self._first_step()
            return
        state = read_state(manifest.path)
        changed = check_identity(state.identity, self.identity, allow_change)
        trained = self.parts.trained
        restore(manifest.path, trained.params, self.parts.optimizer, self.parts.ema, spans=trained.placement.spans)
        trained.placement.publish()
        if self.parts.trained.adapters is not None:
            self.parts.trained.adapters.load_extra(read_extra(manifest.path))
        self.precision.restore(state.scaler)
        self.step, self.exact_from, self.skipped_in_row = state.step, state.exact_from, state.skipped_in_row
        if changed:
            self.exact_from = self.step if self.exact_from is None else self.exact_from
            self.bus.send(Warned(f"the run is not exact from step {self.step}: {', '.join(changed)} changed"))
        altered = [key for key in sorted(self.schedule) if state.schedule.get(key) != self.schedule[key]]
        if altered:
            self.bus.send(Warned(f"from step {self.step} the schedule differs: {', '.join(altered)}"))
        if self.parts.world.is_main:
            if self.metrics.rewind(state.metrics_bytes):
                self.bus.send(Warned(f"{self.metrics.path.name} lacks rows of steps before {self.step}; the weights are not affected"))
            write_config(self.config, self.disk)
        self.bus.send(PhaseStarted("resume", f"resumed from step {self.step}"))

    def _first_step(self) -> int:
        """Where a run without a state begins: at 0, or where `train.first_step` or `first_epoch` say that its weights come from."""
        train, plan = self.config.train, self.parts.plan
        step = train.first_step or -(-(train.first_epoch - 1) * plan.per_epoch // plan.per_step)
        if step >= self.parts.total_steps:
            fix = "raise train.steps, or lower it"
            raise ConfigError(
                f"the run would begin at step {step} and has {self.parts.total_steps} steps", where=str(self.run_dir), fix=fix
            )
        return step

    def _trained_count(self) -> int:
        return sum(param.numel() for param in self.parts.trained.params.values())


def write_config(config: RunConfig, disk: Disk) -> None:
    """`run.toml`: the config that the folder's content was made with."""
    disk.write_text(config.run.dir / "run.toml", to_toml(config))
