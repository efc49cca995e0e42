"""What a run's files are called, which of them are kept, and the states that are also put under sd-scripts' names.

`fluxsmith`: NAME-step00000500.safetensors. `sd-scripts`: NAME-000002.safetensors after an epoch, NAME-step00000500.safetensors after a
step, states in NAME-...-state; the windows of epochs and steps remove everything older, also what an earlier start left.
"""

import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from fluxsmith.config.schema import RunConfig
from fluxsmith.errors import ModelFileError
from fluxsmith.io.durable import Disk
from fluxsmith.io.manifest import verify_folder
from fluxsmith.train.plan import BatchPlan

EPOCH, STEP, STATE = r"-(?P<epoch>\d{6})", r"-step(?P<step>\d{8})", "-state"


class Naming:
    """The names of one run."""

    def __init__(self, config: RunConfig, plan: BatchPlan, total_steps: int, disk: Disk) -> None:
        self.config = config
        self.settings = config.checkpoint
        self.plan = plan
        self.total = total_steps
        self.disk = disk
        self.name = run_name(config)
        self.is_foreign = self.settings.naming == "sd-scripts"

    @property
    def folder(self) -> Path:
        """Where weights files go."""
        return self.settings.weights_dir or self.config.run.dir / "weights"

    @property
    def final(self) -> Path:
        """The weights file of the end."""
        return self.folder / f"{self.name}.safetensors"

    def due(self, step: int) -> list[str]:
        """Stems of what is saved after `step`: empty, one, or (sd-scripts, when an epoch and a step are due) two."""
        by_epoch = self.plan.is_epoch_due(step, self.settings.every_epochs)
        by_step = self.settings.every > 0 and step % self.settings.every == 0
        last = step == self.total
        if not self.is_foreign:
            return [f"{self.name}-step{step:08d}"] if (by_epoch or by_step) and not last else []
        epochs = [f"{self.name}-{self.plan.epochs_done(step):06d}"] if by_epoch and not last else []
        return epochs + ([f"{self.name}-step{step:08d}"] if by_step else [])

    def paths(self, step: int) -> list[Path]:
        """Weights files of `step` along the way."""
        return [self.folder / f"{stem}.safetensors" for stem in self.due(step)]

    def retire_weights(self) -> None:
        """Remove intermediate weights beyond what is kept; only files that this run named are touched."""
        settings = self.settings
        if settings.keep_weights is not None:
            steps = {path: found[1] for path in _own(self.folder, self.name) if (found := re.search(r"-step(\d{8})", path.name))}
            kept = sorted(set(steps.values()))[-settings.keep_weights :]
            self.disk.prune([path for path, step in steps.items() if step not in kept])
        files = _own(self.folder, self.name)
        self.disk.prune(self._outside(files, r"(-\w+)?\.safetensors", settings.keep_epochs, settings.keep_steps))

    def publish_state(self, state: Path, step: int) -> None:
        """Put a complete state under sd-scripts' names too (the same bytes, linked), and remove those beyond the windows."""
        target, settings = self.settings.state_dir, self.settings
        if target is None:
            return
        stems = self.due(step) if settings.state_at == "checkpoints" else []
        if step == self.total:
            stems = [*stems, self.name]
        for stem in stems:
            link_folder(state, target / f"{stem}{STATE}", self.disk)
        epochs = settings.keep_state_epochs or settings.keep_epochs
        steps = settings.keep_state_steps or settings.keep_steps
        folders = [path for path in _own(target, self.name) if path.is_dir()]
        self.disk.prune(self._outside(folders, STATE, epochs, steps))

    def _outside(self, paths: Sequence[Path], ending: str, keep_epochs: int | None, keep_steps: int | None) -> list[Path]:
        """Paths of epochs and steps that lie before the window that ends at the newest one."""
        gone: list[Path] = []
        for pattern, keep, stride in ((EPOCH, keep_epochs, self.settings.every_epochs), (STEP, keep_steps, 1)):
            if keep is None:
                continue
            numbers = {path: int(found[1]) for path in paths if (found := re.fullmatch(re.escape(self.name) + pattern + ending, path.name))}
            newest = max(numbers.values(), default=0)
            limit = newest - keep * stride
            gone += [path for path, number in numbers.items() if (number <= limit if pattern == EPOCH else number < limit)]
        return sorted(gone)


def _own(folder: Path, name: str) -> list[Path]:
    """Entries that this run may have named."""
    return sorted(path for path in folder.iterdir() if path.name.startswith(f"{name}-")) if folder.is_dir() else []


def run_name(config: RunConfig) -> str:
    """Name of the weights files."""
    return config.run.name or config.run.dir.name


def sample_path(config: RunConfig, moment: str, index: int, seed: int) -> Path:
    """A picture's place as sd-scripts names it: `sample/NAME_000500_00_20261121093000_42.png`, `NAME_e000002_...` after an epoch.

    A picture of the same moment that is there already keeps its name.
    """
    folder = (config.checkpoint.weights_dir or config.run.dir) / "sample"
    first, last = f"{run_name(config)}_{moment}_{index:02d}_", f"_{seed}.png"
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(first) and path.name.endswith(last) and len(path.name) == len(first) + 14 + len(last):
                return path
    return folder / f"{first}{time.strftime('%Y%m%d%H%M%S')}{last}"


def link_folder(source: Path, target: Path, disk: Disk) -> None:
    """A complete copy of a state folder that shares its bytes where the file system can; it appears under its name only when complete."""
    temporary = target.with_name(f".{target.name}.tmp")
    disk.make_folder(target.parent)
    disk.remove_tree(temporary)
    disk.mkdir(temporary)
    for path in sorted(source.iterdir()):
        try:
            os.link(path, temporary / path.name)
        except OSError:  # another file system, or one without links
            shutil.copy2(path, temporary / path.name)
    disk.fsync_folder(temporary)
    disk.remove_tree(target)
    disk.rename(temporary, target)


def take_state(source: Path, states: Path, disk: Disk) -> int:
    """Make a state from anywhere the newest one of `states`; later ones are set aside. Returns its step. Raises ModelFileError."""
    manifest = verify_folder(source)
    step = manifest.extra.get("step")
    if not isinstance(step, int):
        raise ModelFileError("this folder holds no state of a run", where=str(source), fix="name a NAME-...-state or state/step-... folder")
    disk.make_folder(states)
    aside = states / "set-aside"
    for path in sorted(states.glob("step-*")):
        if path.is_dir() and int(path.name[5:]) >= step and path.resolve() != source.resolve():
            disk.make_folder(aside)
            disk.remove_tree(aside / path.name)
            disk.rename(path, aside / path.name)
    own = states / f"step-{step:06d}"
    if own.resolve() != source.resolve():
        link_folder(source, own, disk)
    return step
