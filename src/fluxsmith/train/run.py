"""One training run from a config to its folder: lock, sinks, build, train, report. `train(config)` is the public call."""

from collections.abc import Sequence
from pathlib import Path

import torch

from fluxsmith.config.choice import realise
from fluxsmith.config.schema import RunConfig
from fluxsmith.errors import ConfigError, FluxsmithError, OutOfMemoryError, StopRequested, StorageError
from fluxsmith.events import Bus, CacheProgress, Event, PhaseStarted, RunFailed, RunStarted, StepEnded, Warned
from fluxsmith.io.durable import Disk, RunLock, clean_temporary
from fluxsmith.train.distributed import World, join_world
from fluxsmith.train.launch import launched
from fluxsmith.train.naming import take_state
from fluxsmith.train.planning import apply, out_of_memory_cures
from fluxsmith.train.report import write_report
from fluxsmith.train.setup import build
from fluxsmith.train.sinks.jsonl import JsonlSink
from fluxsmith.train.trainer import Trainer, write_config

PHASES = {"load": "load", "quantise": "quantise", "encode captions": "encode captions", "encode pictures": "encode pictures"}  # in plans


def train(
    config: RunConfig, *, resume: bool | Path = False, allow_change: Sequence[str] = (), bus: Bus | None = None, disk: Disk | None = None
) -> Path:
    """Run the training that `config` describes; returns the final weights file.

    `resume` continues the newest complete state of the folder (or starts, if there is none), or a state folder from anywhere;
    `allow_change` names identity keys that may differ.

    Raises the FluxsmithError of whatever went wrong; StopRequested after a stop with a resumable state.
    """
    disk = disk or Disk()
    config, notes = launched(config)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    world = join_world(config.train.device)
    if not world.is_main:
        return Trainer(build(apply(config, Bus()), world, Bus()), Bus(), disk).run(allow_change)
    disk.probe(config.run.dir)
    with RunLock(config.run.dir) as lock:
        _check_fresh(config, bool(resume))
        if isinstance(resume, Path):
            take_state(resume, config.run.dir / "state", disk)
        for folder in (config.run.dir, config.run.dir / "state", config.run.dir / "weights"):
            clean_temporary(folder, disk=disk)
        if not _holds_run(config.run.dir):  # otherwise the config is written once the resume is granted
            write_config(config, disk)
        bus = bus or Bus()
        bus.sinks[:0] = [JsonlSink(config.run.dir / "events.jsonl", disk)]
        bus.sinks += [lambda event: lock.beat(), *(realise(sink).build(config) for sink in config.sinks)]
        for note in notes:
            bus.send(Warned(note))
        return _reported(config, world, bus, disk, allow_change)


def _reported(config: RunConfig, world: World, bus: Bus, disk: Disk, allow_change: Sequence[str]) -> Path:
    """Train; whatever happens is an event, and the report is written."""
    bus.sinks.append(phases := LastPhase())
    try:
        return Trainer(build(apply(config, bus), world, bus), bus, disk).run(allow_change)
    except StopRequested:
        raise
    except torch.OutOfMemoryError as error:
        failure = out_of_memory(config, error, phases.last)
        bus.send(RunFailed(0, failure.kind, str(failure), failure.exit_code))
        raise failure from error
    except FluxsmithError as error:
        bus.send(RunFailed(0, error.kind, "; ".join(error.lines()), error.exit_code))
        raise
    except Exception as error:  # a bug: whoever watches the events must learn that the run is over
        bus.send(RunFailed(0, type(error).__name__, str(error), FluxsmithError.exit_code))
        raise
    finally:
        try:
            write_report(config.run.dir, disk)
        except StorageError as error:  # must not hide what ended the run
            bus.send(Warned(f"the report could not be written: {error}"))


class LastPhase:
    """A listener that knows what the run is busy with."""

    def __init__(self) -> None:
        self.last = "load"

    def __call__(self, event: Event) -> None:
        if isinstance(event, PhaseStarted):
            self.last = event.name
        elif isinstance(event, RunStarted | StepEnded):
            self.last = "train"
        elif isinstance(event, CacheProgress):
            self.last = f"encode {'captions' if 'text' in event.what else 'pictures'}"


def out_of_memory(config: RunConfig, error: Exception, phase: str = "train") -> OutOfMemoryError:
    """The card is full: say in which phase, and the three cheapest changes with what they save."""
    cures = out_of_memory_cures(config, PHASES.get(phase, "train")) or ["a smaller data.resolution"]
    fix = "; ".join(cures)
    return OutOfMemoryError(f"out of memory in phase {phase!r}", where=str(config.run.dir), why=str(error).split(". ")[0], fix=fix)


def _check_fresh(config: RunConfig, resume: bool) -> None:
    """Without --resume a folder that holds a run is left alone."""
    if _holds_run(config.run.dir) and not resume:
        raise ConfigError(
            "this folder holds a run already", where=str(config.run.dir), fix="add --resume to continue it, or choose another run.dir"
        )


def _holds_run(run_dir: Path) -> bool:
    return any((run_dir / "state").glob("step-*"))
