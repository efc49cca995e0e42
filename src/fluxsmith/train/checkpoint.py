"""Resumable states: weights, optimizer, EMA and position in one folder that is complete or absent.

`runs/cats/state/step-000500/` holds weights.safetensors, optimizer.safetensors, ema.safetensors, state.json and
MANIFEST.json (written last). Order of the data, captions and noise need no state: they follow from the step number.
Of a sharded transformer every process writes its rows (`shard_files.py`), or the first one puts all together.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fluxsmith.errors import ModelFileError, Problem, StorageError
from fluxsmith.io.durable import Disk, newest_complete, numbered_folders, readable_size
from fluxsmith.io.manifest import Newest
from fluxsmith.io.safetensors import save_weights
from fluxsmith.train.distributed import World
from fluxsmith.train.ema import Ema
from fluxsmith.train.optimizer_state import join_optimizer, split_optimizer
from fluxsmith.train.placement import Placement, Span
from fluxsmith.train.shard_files import Stored, own_part, rank_file, span_of

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


class Sharing(NamedTuple):
    """How the processes of a sharded run save together."""

    world: World
    placement: Placement
    whole: bool = False
    """The first process writes everything, instead of each its rows."""


class StateFolder:
    """The `state/` folder of a run."""

    def __init__(self, folder: Path, disk: Disk, sharing: Sharing | None = None) -> None:
        self.folder = folder
        self.disk = disk
        self.sharing = sharing
        self.extra: Callable[[], Mapping[str, Tensor]] = dict  # asked at each save

    def path(self, step: int) -> Path:
        """Folder of one step."""
        return self.folder / f"step-{step:06d}"

    def save(
        self, state: State, params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, ema: Ema | None, *, keep: int
    ) -> Path:
        """Write a complete state, then prune older ones beyond `keep`. Raises StorageError; older states stay untouched.

        In a sharded run every process calls this.
        """
        tensors, numbers = split_optimizer(params, optimizer)
        files = {WEIGHTS: {name: param.detach() for name, param in params.items()}, OPTIMIZER: tensors}
        if ema is not None:
            files[EMA] = ema.shadow
        extra = self.extra()
        if extra:
            files[EXTRA] = dict(extra)
        small = {**state.__dict__, "optimizer": numbers}
        try:
            if self.sharing is None:
                self._write(self.path(state.step), files, small)
            else:
                self._write_together(self.sharing, self.path(state.step), files, small)
        except StorageError as error:
            raise StorageError(str(error), problems=(*error.problems, self._what_is_left())) from error
        if self.sharing is None or self.sharing.world.is_main:
            self.retire(state.step, keep)
        return self.path(state.step)

    def _write(self, final: Path, files: Mapping[str, Mapping[str, Tensor]], small: Mapping[str, Any]) -> None:
        self.disk.make_folder(self.folder)
        with self.disk.folder(final, extra={"step": small["step"]}, size=sum(_bytes(part.values()) for part in files.values())) as folder:
            for name, tensors in files.items():
                save_weights(folder / name, tensors, {}, disk=self.disk)
            self.disk.write_json(folder / STATE, small)

    def _write_together(self, how: Sharing, final: Path, files: Mapping[str, Mapping[str, Tensor]], small: Mapping[str, Any]) -> None:
        """Rows of all processes in one folder, which the first completes when every file is on the medium; or all by the first."""
        if how.whole:
            put = {name: {key: _whole(how.placement, key, value) for key, value in part.items()} for name, part in files.items()}
            if how.world.is_main:
                self._write(final, put, small)
            how.world.barrier()
            return
        if not how.world.is_main:
            self._write_rows(how, Path(how.world.share(None)), files)
            how.world.barrier()
            return
        self.disk.make_folder(self.folder)
        with self.disk.folder(final, extra={"step": small["step"]}) as folder:
            how.world.share(str(folder))
            self._write_rows(how, folder, files)
            self.disk.write_json(folder / STATE, small)
        how.world.barrier()

    def _write_rows(self, how: Sharing, folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        """This process's files. Raises StorageError in all processes if one of them could not write."""
        problem: StorageError | None = None
        try:
            for name, tensors in files.items():
                part, metadata = own_part(tensors, how.placement.spans, is_main=how.world.is_main)
                save_weights(folder / rank_file(name, how.world.rank, how.world.size), part, metadata, disk=self.disk)
        except StorageError as error:
            problem = error
        if how.world.any(problem is not None):
            raise problem or StorageError("another process could not write its part of the state", where=str(folder))

    def _what_is_left(self) -> Problem:
        numbers = [number for number, _ in numbered_folders(self.folder)]
        what = f"the newest state is that of step {numbers[-1]}" if numbers else "there is no older state"
        return Problem(what, where=str(self.folder), fix="start again with --resume when the disk is well")

    def lack_of_space(self, params: Mapping[str, nn.Parameter], ema: Ema | None, keep: int) -> str:
        """A warning if the states of a run will not fit (moments reckoned as two fp32 numbers a weight), else nothing."""
        sizes = {name: math.prod(self._shape(name, param)) for name, param in params.items()}
        count = sum(sizes.values())
        one = sum(sizes[name] * param.element_size() for name, param in params.items()) + 8 * count + (4 * count if ema is not None else 0)
        need, free = one * (keep + 1), self.disk.free_bytes(self.folder)
        if free >= need:
            return ""
        return (
            f"{keep} states and one being written need about {readable_size(need)}, {readable_size(free)} are free in {self.folder.parent}"
        )

    def _shape(self, name: str, param: Tensor) -> tuple[int, ...]:
        span = self.sharing.placement.spans.get(name) if self.sharing is not None else None
        return tuple(param.shape) if span is None else span.shape

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


def _whole(placement: Placement, name: str, value: Tensor) -> Tensor:
    """All rows of a trained tensor, of its average, or of a state of its optimizer."""
    key = name.partition("|")[0]
    return value if span_of(name, value, placement.spans) is None else placement.whole(key, value)


@torch.no_grad()
def restore(
    folder: Path,
    params: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    *,
    spans: Mapping[str, Span] | None = None,
) -> None:
    """Put weights, optimizer state and EMA back, strictly; of sharded tensors the rows that `spans` tells.

    Raises ModelFileError if anything is missing or misshapen.
    """
    spans = spans or {}
    _copy_into(params, Stored(folder, WEIGHTS), spans)
    if ema is not None:  # a run that had no average before begins it here
        has_ema = any(folder.glob(EMA.replace(".", "*.")))
        _copy_into(ema.shadow, Stored(folder, EMA if has_ema else WEIGHTS), spans)
    numbers = json.loads((folder / STATE).read_text(encoding="utf-8"))["optimizer"]
    stored = Stored(folder, OPTIMIZER)
    join_optimizer(params, optimizer, {key: stored.read_as(key, spans) for key in stored}, numbers)


def read_extra(folder: Path) -> dict[str, Tensor]:
    """What `StateFolder.extra` gave when the state was saved; empty if that was nothing."""
    if not any(folder.glob(EXTRA.replace(".", "*."))):
        return {}
    stored = Stored(folder, EXTRA)
    return {name: stored.read(name) for name in stored}


def _copy_into(targets: Mapping[str, Tensor], stored: Stored, spans: Mapping[str, Span]) -> None:
    """Every tensor of the file into the target of its name."""
    expected = {name: spans[name].shape if name in spans else tuple(target.shape) for name, target in targets.items()}
    odd = sorted(name for name in stored.shapes.keys() | expected.keys() if stored.shapes.get(name) != expected.get(name))
    if odd:
        what = f"the state holds other tensors than the run: {', '.join(odd[:5])}"
        raise ModelFileError(what, where=stored.where, fix="set back what changed, or start a new run")
    for name, target in targets.items():
        target.copy_(stored.read(name, spans.get(name)))
