"""Resumable states: weights, optimizer, EMA and position in one folder that is complete or absent.

`runs/cats/state/step-000500/` holds weights.safetensors, optimizer.safetensors, ema.safetensors, state.json and
MANIFEST.json (written last). Order of the data, captions and noise need no state: they follow from the step number.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fluxsmith.errors import ModelFileError, Problem, StorageError
from fluxsmith.io.durable import Disk, newest_complete, numbered_folders, readable_size
from fluxsmith.io.manifest import Newest
from fluxsmith.io.safetensors import open_weights, save_weights
from fluxsmith.train.ema import Ema
from fluxsmith.train.optimizer_state import join_optimizer, split_optimizer

WEIGHTS, OPTIMIZER, EMA, STATE = "weights.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"
EXTRA = "adapter.safetensors"  # what adapters keep beside their weights, if anything


@dataclass(frozen=True)
class State:
    """The small part of a checkpoint."""

    step: int
    metrics_bytes: int  # length of metrics.jsonl that belongs to this state
    identity: dict[str, Any]  # what must not change for an exact continuation
    schedule: dict[str, Any]  # what may change with a note
    exact_from: int | None = None  # step since which the run is not exact, None: from the start
    skipped_in_row: int = 0
    scaler: dict[str, float] | None = None


class StateFolder:
    """The `state/` folder of a run."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self.folder = folder
        self.disk = disk
        self.extra: Callable[[], Mapping[str, Tensor]] = dict  # asked at each save

    def path(self, step: int) -> Path:
        """Folder of one step."""
        return self.folder / f"step-{step:06d}"

    def save(
        self, state: State, params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, ema: Ema | None, *, keep: int
    ) -> Path:
        """Write a complete state, then prune older ones beyond `keep`. Raises StorageError; older states stay untouched."""
        tensors, numbers = split_optimizer(params, optimizer)
        files = {WEIGHTS: {name: param.detach() for name, param in params.items()}, OPTIMIZER: tensors}
        if ema is not None:
            files[EMA] = ema.shadow
        extra = self.extra()
        if extra:
            files[EXTRA] = dict(extra)
        small = {**state.__dict__, "optimizer": numbers}
        try:
            self._write(self.path(state.step), files, small)
        except StorageError as error:
            raise StorageError(str(error), problems=(*error.problems, self._what_is_left())) from error
        self.retire(state.step, keep)
        return self.path(state.step)

    def _write(self, final: Path, files: Mapping[str, Mapping[str, Tensor]], small: Mapping[str, Any]) -> None:
        self.disk.make_folder(self.folder)
        with self.disk.folder(final, extra={"step": small["step"]}, size=sum(_bytes(part.values()) for part in files.values())) as folder:
            for name, tensors in files.items():
                save_weights(folder / name, tensors, {}, disk=self.disk)
            self.disk.write_json(folder / STATE, small)

    def _what_is_left(self) -> Problem:
        numbers = [number for number, _ in numbered_folders(self.folder)]
        what = f"the newest state is that of step {numbers[-1]}" if numbers else "there is no older state"
        return Problem(what, where=str(self.folder), fix="start again with --resume when the disk is well")

    def lack_of_space(self, params: Mapping[str, nn.Parameter], ema: Ema | None, keep: int) -> str:
        """A warning if the states of a run will not fit (moments reckoned as two fp32 numbers a weight), else nothing."""
        count = sum(param.numel() for param in params.values())
        one = _bytes(params.values()) + 8 * count + (4 * count if ema is not None else 0)
        need, free = one * (keep + 1), self.disk.free_bytes(self.folder)
        if free >= need:
            return ""
        return (
            f"{keep} states and one being written need about {readable_size(need)}, {readable_size(free)} are free in {self.folder.parent}"
        )

    def retire(self, step: int, keep: int) -> None:
        """Prune states up to `step` beyond the newest `keep`; later ones were passed over on resume and do not count."""
        self.disk.prune([path for number, path in numbered_folders(self.folder) if number <= step][:-keep])

    def newest(self) -> Newest:
        """The newest complete state, and why newer ones were passed over."""
        return newest_complete(self.folder)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def read_state(folder: Path) -> State:
    """The small part of a checkpoint; raises ModelFileError if it cannot be read."""
    try:
        values = json.loads((folder / STATE).read_text(encoding="utf-8"))
        values.pop("optimizer")
        return State(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError("the state cannot be read", where=str(folder), why=str(error), fix="resume from an older state") from error


@torch.no_grad()
def restore(folder: Path, params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, ema: Ema | None) -> None:
    """Put weights, optimizer state and EMA back, strictly. Raises ModelFileError if anything is missing or misshapen."""
    _copy_into(params, folder / WEIGHTS)
    if ema is not None:  # a run that had no average before begins it here
        _copy_into(ema.shadow, folder / (EMA if (folder / EMA).exists() else WEIGHTS))
    numbers = json.loads((folder / STATE).read_text(encoding="utf-8"))["optimizer"]
    with open_weights(folder / OPTIMIZER) as stored:
        tensors = {key: stored.tensor(key) for key in stored}
    join_optimizer(params, optimizer, tensors, numbers)


def read_extra(folder: Path) -> dict[str, Tensor]:
    """What `StateFolder.extra` gave when the state was saved; empty if that was nothing."""
    if not (folder / EXTRA).exists():
        return {}
    with open_weights(folder / EXTRA) as stored:
        return {name: stored.tensor(name) for name in stored}


def _copy_into(targets: Mapping[str, Tensor], path: Path) -> None:
    """Every tensor of the file into the target of its name."""
    with open_weights(path) as stored:
        found = {name: info.shape for name, info in stored.infos.items()}
        expected = {name: tuple(target.shape) for name, target in targets.items()}
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        if odd:
            what = f"the state holds other tensors than the run: {', '.join(odd[:5])}"
            raise ModelFileError(what, where=str(path), fix="set back what changed, or start a new run")
        for name, target in targets.items():
            target.copy_(stored.tensor(name))
