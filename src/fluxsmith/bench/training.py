"""A scenario of training as the trainer runs it: its config, random models, samples, and the trainer on all that.

`train.setup.equip` puts the parts together and `Trainer` takes the steps, so what is measured is what runs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fluxsmith.bench.scenarios import ALL_SELECTIVE, Scenario
from fluxsmith.bench.sizes import Size, random_ae, random_dit
from fluxsmith.config.choice import realise
from fluxsmith.config.load import load_config
from fluxsmith.config.schema import RunConfig
from fluxsmith.data.dataset import PreparedData, prepare
from fluxsmith.data.types import Batch, BatchSpec, Encoders, Use
from fluxsmith.data.types import Size as Side
from fluxsmith.events import Bus
from fluxsmith.io.durable import Disk
from fluxsmith.memory.plan import GIB, choose
from fluxsmith.models.assembly import Level, Models, TextStates, velocity
from fluxsmith.models.files import ModelFiles
from fluxsmith.randomness import generator
from fluxsmith.train.distributed import World
from fluxsmith.train.planning import planned, with_choice
from fluxsmith.train.precision import Precision
from fluxsmith.train.setup import Material, Parts, base_dtype, equip
from fluxsmith.train.trainer import Trainer

PICTURES = 8  # in the folder that the loader reads
SEED = 0


class Samples:
    """Random latents and text states by the number of their use: what cached data would give, without a disk."""

    digest = "random"
    batch_sizes = (1,)

    def __init__(self, scenario: Scenario, size: Size) -> None:
        self.side, self.text, self.batch, self.params = size.side(scenario.side), size.text(scenario.text), scenario.batch, size.params
        self.has_condition = "control" in scenario.run

    def batches(self, epoch: int) -> list[BatchSpec]:
        """An epoch of 64 batches."""
        first = epoch * 64 * self.batch
        starts = range(first, first + 64 * self.batch, self.batch)
        box = Side(self.side, self.side)
        return [BatchSpec(epoch, 0, box, tuple(Use(0, 0, start + i) for i in range(self.batch))) for start in starts]

    def load(self, spec: BatchSpec, *, step: int, total_steps: int | None = None) -> Batch:
        """The batch of a spec; values depend on the numbers of its uses alone."""
        numbers = tuple(use.number for use in spec.uses)
        cells = self.side // 8
        latents = torch.stack([self._draw("latents", number, 16, cells, cells) for number in numbers])
        txt = torch.stack([self._draw("txt", number, self.text, self.params.context_in_dim) for number in numbers])
        pooled = torch.stack([self._draw("pooled", number, self.params.vec_in_dim) for number in numbers])
        text = TextStates(txt, pooled, torch.ones(len(numbers), self.text, dtype=torch.bool))
        shape = (3, self.side, self.side)
        condition = torch.stack([self._draw("condition", n, *shape).clamp(-1, 1) for n in numbers]) if self.has_condition else None
        keys = tuple(map(str, numbers))
        return Batch(keys, numbers, keys, latents, None, text, torch.ones(len(numbers)), condition=condition)

    def largest(self) -> BatchSpec:
        """All are alike."""
        return self.batches(0)[0]

    def _draw(self, purpose: str, number: int, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator(SEED, f"bench {purpose}", number % 16))


def config_of(scenario: Scenario, size: Size, folder: Path, device: torch.device) -> RunConfig:
    """The run file of a scenario."""
    run = {name: dict(section) if isinstance(section, Mapping) else section for name, section in scenario.run.items()}
    memory = dict(run.get("memory", {}))
    if memory.get("checkpointing_plan", {}).get("selective") == ALL_SELECTIVE:
        memory["checkpointing_plan"] = {"selective": size.total}
    if memory.get("stream_blocks"):
        memory["stream_blocks"] = size.blocks(memory["stream_blocks"])
    data = {"type": "folder", "path": str(folder / "pictures"), "resolution": size.side(scenario.side), "batch_size": scenario.batch}
    if "control" in run:
        data["condition_dir"] = str(folder / "conditions")
    plain = {
        "model": {"type": "flux1"},
        **run,
        "memory": memory,
        "train": {"steps": 100_000, "seed": SEED, "device": device.type, **run.get("train", {})},
        "data": [data],
        "cache": {"dir": str(folder / "cache")},
        "run": {"dir": str(folder / "run")},
    }
    return load_config(plain).config


class BenchTrainer(Trainer):
    """The trainer, one step at a time."""

    def go(self) -> float:
        """One optimizer step; returns its loss."""
        result = self._optimizer_step()
        self.step += 1
        return result.loss


class Training(NamedTuple):
    """A scenario made ready."""

    parts: Parts
    trainer: BenchTrainer


def ready(scenario: Scenario, size: Size, folder: Path, device: torch.device, *, card: float = 0.0) -> Training:
    """Build everything; for an emulated card the plan chooses, unless the scenario does. Raises what a run would raise."""
    (folder / "run").mkdir(parents=True, exist_ok=True)
    config = config_of(scenario, size, folder, device)
    if card and not config.memory.streams and config.adapter is not None:
        config = with_choice(config, choose(planned(config, on_card=True, shapes=size.shapes).job, card))
    if config.quant is not None:
        realise(config.quant).require(device)
    dtype = base_dtype(config, device)
    dit = random_dit(size, config.quant, device, dtype=dtype, place=_place(config, size, device))
    ae = random_ae(size, device, dtype=dtype) if config.control else None
    models = Models(dit=dit, ae=ae)
    world, bus = World(device), Bus()
    data = _loaded(config, scenario, size, bus) if scenario.options.get("loader") else cast(PreparedData, Samples(scenario, size))
    objective = realise(config.objective).build(config.noise, config.train.seed)
    parts = equip(config, models, Material(objective, data, ModelFiles({}, {})), world, bus)
    parts.facts = {"data": data.digest}
    stir(parts.trained.params)
    return Training(parts, BenchTrainer(parts, bus, Disk()))


def _place(config: RunConfig, size: Size, device: torch.device) -> torch.device | None:
    """Where the model is put together: on the host if the card cannot take all of it, as in a run."""
    if device.type != "cuda":
        return None
    return torch.device("cpu") if planned(config, on_card=True, shapes=size.shapes).job.by_host else None


@torch.no_grad()
def stir(params: Mapping[str, nn.Parameter]) -> None:
    """Trained tensors that begin at zero get small values: otherwise half of all gradients would be zero."""
    for name, param in params.items():
        if not bool(param.any()):
            values = torch.randn(param.shape, generator=generator(SEED, "bench stir", name))
            param.copy_(values.mul_(0.1 * max(1, param.shape[-1]) ** -0.5))


def _loaded(config: RunConfig, scenario: Scenario, size: Size, bus: Bus) -> PreparedData:
    """Pictures in a folder, encoded into disk caches by stand-ins, and the loader of a run on them."""
    folder, pixels = config.run.dir.parent / "pictures", size.side(scenario.side)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    for number in range(PICTURES):
        Image.fromarray(rng.integers(0, 255, (pixels, pixels, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}", encoding="utf-8")
    length, params = size.text(scenario.text), size.params

    def latents(pictures: Tensor) -> Tensor:
        small = nn.functional.avg_pool2d(pictures, 8)
        return small.repeat(1, 6, 1, 1)[:, :16].contiguous()

    def text(captions: Sequence[str]) -> TextStates:
        txt = [torch.randn(length, params.context_in_dim, generator=generator(SEED, "bench txt", one)) for one in captions]
        pooled = [torch.randn(params.vec_in_dim, generator=generator(SEED, "bench pooled", one)) for one in captions]
        return TextStates(torch.stack(txt), torch.stack(pooled), torch.ones(len(captions), length, dtype=torch.bool))

    encoders = Encoders(latents, "random", text, "random")
    return prepare(config.data, cache=config.cache, seed=SEED, encoders=encoders, bus=bus, run_dir=config.run.dir)


def probe(training: Training, *, kept: int = 65_536) -> dict[str, Tensor]:
    """What a check compares: the velocity of the first batch, its loss, and the first values of every trained tensor's gradient."""
    parts = training.parts
    trained, models, device = parts.trained, parts.models, parts.world.device
    if models.dit is None:
        raise ValueError("the transformer is not loaded")
    precision = Precision(parts.config.train.precision, device)
    batch = parts.data.load(parts.data.batches(0)[0], step=0)
    trained.zero_grad()
    with precision.autocast():
        loss = parts.objective.loss(models, batch, device)
    loss.total.backward()
    found = {f"gradient {name}": flat(p.grad, kept) for name, p in trained.params.items() if p.grad is not None}
    trained.zero_grad()
    if batch.latents is not None and batch.text is not None:
        text = batch.text.to(device, next(models.dit.parameters()).dtype)
        level = Level(torch.full((len(batch.keys),), 0.6, device=device), torch.ones(len(batch.keys), device=device))
        with torch.no_grad(), precision.autocast():
            controls = models.conditioners(batch.condition)
            made = velocity(models.dit, batch.latents.to(device), text, level, controls=controls)
        found["velocity"] = made.float().cpu()
    return {**found, "loss": loss.total.detach().float().cpu().reshape(1)}


def flat(gradient: Tensor, kept: int) -> Tensor:
    """The first values, fp32 on the host."""
    return gradient.detach().reshape(-1)[:kept].float().cpu()


def static_bytes(training: Training) -> dict[str, int]:
    """Bytes of weights, trained tensors and optimizer states by kind of device."""
    parts = training.parts
    tensors: list[Tensor] = [*parts.trained.params.values()]
    for module in [*parts.models.loaded().values(), *(control_nets(parts.models))]:
        tensors += [*module.parameters(), *module.buffers()]
    for state in parts.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    storages = {t.untyped_storage()._cdata: (t.device.type, t.untyped_storage().nbytes()) for t in tensors if t.device.type != "meta"}
    made: dict[str, int] = {}
    for place, nbytes in storages.values():
        made[place] = made.get(place, 0) + nbytes
    return made


def control_nets(models: Models) -> list[nn.Module]:
    """Networks of the controls."""
    return [net for control in models.controls for net in control.nets]


def emulate(card: float, device: torch.device) -> None:
    """Let this process use no more of the device than a smaller card would have; the rest of a GiB is the context."""
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    torch.cuda.set_per_process_memory_fraction(min(1.0, (card - 0.55) / total), device)
