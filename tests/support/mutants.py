"""Deliberate faults in saving and resuming, put in by replacing one function each. A check that lets one live proves nothing.

The list of facts: no restore of random state, schedule, average, optimizer step; position off by one; rename before fsync; prune
before rename; manifest before data; a row written twice; a cache key without the caption. What is stateless here (draws, schedule,
position) is broken where it is computed from the step.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fluxsmith.data import loading, wanted
from fluxsmith.io.durable import Disk
from fluxsmith.io.manifest import numbered_folders
from fluxsmith.optim import schedules
from fluxsmith.optim.schedules import factor
from fluxsmith.train import checkpoint, trainer
from fluxsmith.train.metrics import Metrics
from fluxsmith.train.plan import BatchPlan


def no_random_state() -> None:
    """Dropout draws go on from wherever the process begins."""
    original = trainer.Trainer.__init__

    def init(self: trainer.Trainer, *args: Any) -> None:
        original(self, *args)
        torch.default_generator.manual_seed(0)

    trainer.Trainer.__init__ = init
    trainer.seed_device = lambda device, seed: None


def dropout_by_local_count() -> None:
    """Dropout is seeded by a count of this process, not of the run."""
    original, count = trainer.Trainer.__init__, [0]

    def init(self: trainer.Trainer, *args: Any) -> None:
        original(self, *args)
        count[0] = 0

    def seed(device: torch.device, seed: int) -> None:
        count[0] += 1
        torch.default_generator.manual_seed(count[0])

    trainer.Trainer.__init__ = init
    trainer.seed_device = seed


def schedule_from_local_step() -> None:
    """The learning rate begins anew after a resume."""
    original, first = trainer.Trainer._resume, [0]

    def resume(self: trainer.Trainer, allow_change: Any) -> None:
        original(self, allow_change)
        first[0] = self.step

    trainer.Trainer._resume = resume
    schedules.factor = lambda config, step, total: factor(config, step - first[0], total)


def no_average() -> None:
    """The average begins anew from the resumed weights."""
    original = checkpoint.restore
    trainer.restore = lambda folder, params, optimizer, ema, **more: original(folder, params, optimizer, None, **more)


def position_off_by_one() -> None:
    """After a resume one optimizer step's pictures are left out."""
    resume, micro_batches, shift = trainer.Trainer._resume, BatchPlan.micro_batches, [0]

    def shifted(self: trainer.Trainer, allow_change: Any) -> None:
        resume(self, allow_change)
        shift[0] = int(self.step > 0)

    trainer.Trainer._resume = shifted
    BatchPlan.micro_batches = lambda self, step, rank=0: micro_batches(self, step + shift[0], rank)


def optimizer_step_reset() -> None:
    """The moments come back, their step count does not."""
    original = checkpoint.join_optimizer

    def join(params: Mapping[str, Any], optimizer: torch.optim.Optimizer, tensors: Mapping[str, Any], numbers: Mapping[str, Any]) -> None:
        original(params, optimizer, tensors, numbers)
        for state in optimizer.state.values():
            state["step"].zero_()

    checkpoint.join_optimizer = join


def rename_before_fsync() -> None:
    """A state gets its name first and is synced afterwards."""
    sync, complete = Disk.fsync, Disk._complete

    def late(self: Disk, temporary: Path, final: Path, extra: Mapping[str, Any]) -> None:
        Disk.fsync = lambda self, fd, path: None
        try:
            complete(self, temporary, final, extra)
        finally:
            Disk.fsync = sync
        for path in sorted(final.iterdir()):
            with path.open("rb") as file:
                self.fsync(file.fileno(), path)

    Disk._complete = late
    Disk._write_stream = _without_fsync(Disk._write_stream, sync)


def _without_fsync(write: Callable[..., Any], sync: Callable[..., None]) -> Callable[..., Any]:
    def quiet(self: Disk, path: Path, data: Any, size: int | None) -> Any:
        inside = any(path.is_relative_to(folder) for folder in self._open_folders)
        kind = type(self)
        kept = kind.__dict__.get("fsync")
        if inside:
            kind.fsync = lambda self, fd, path: None
        try:
            return write(self, path, data, size)
        finally:
            if inside and kept is not None:
                kind.fsync = kept
            elif inside:
                del kind.fsync

    return quiet


def prune_before_rename() -> None:
    """Old states go before the new one is there."""
    original = checkpoint.StateFolder.save

    def save(self: checkpoint.StateFolder, state: Any, *args: Any, keep: int) -> Path:
        self.disk.prune([path for _, path in numbered_folders(self.folder)])
        return original(self, state, *args, keep=keep)

    checkpoint.StateFolder.save = save


def manifest_before_data() -> None:
    """A state lies under its name from the beginning, with a manifest that cannot know its files yet."""

    @contextmanager
    def folder(self: Disk, final: Path, *, extra: Mapping[str, Any] | None = None, size: int = 0) -> Iterator[Path]:
        self.mkdir(final)
        self.write_json(final / "MANIFEST.json", {"format": 1, "extra": dict(extra or {}), "files": {}})
        yield final

    Disk.folder = folder


def row_twice() -> None:
    """Rows of steps that are computed again stay."""
    Metrics.rewind = lambda self, size: 0


def rows_not_synced() -> None:
    """A state may outlive the rows that it counts."""
    Metrics.sync = lambda self: None


def folder_not_synced() -> None:
    """A rename may be lost although the save has ended."""
    Disk.fsync_folder = lambda self, path: os.fspath(path) and None
    from disks import RecordingDisk

    RecordingDisk.fsync_folder = Disk.fsync_folder


def key_without_caption() -> None:
    """Cached text states are found whatever the caption says."""
    for module in (wanted, loading):
        module.text_key = lambda caption, encoder: "one key for all"


MUTANTS: dict[str, tuple[Callable[[], None], str]] = {  # name -> fault, and the check that should see it
    fault.__name__: (fault, check)
    for check, faults in {
        "crash": (
            no_random_state,
            dropout_by_local_count,
            schedule_from_local_step,
            no_average,
            position_off_by_one,
            optimizer_step_reset,
            manifest_before_data,
            row_twice,
        ),
        "power": (rename_before_fsync, prune_before_rename, rows_not_synced, folder_not_synced),
        "captions": (key_without_caption,),
    }.items()
    for fault in faults
}
