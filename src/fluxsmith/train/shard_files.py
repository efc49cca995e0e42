"""The tensor files of a state: one file, or one a process, each with its rows. Either is read by any number of processes.

`weights.safetensors`, or `weights-rank0001-of-0002.safetensors` and so on; their metadata say which rows of which shape they hold.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fluxsmith.errors import ModelFileError
from fluxsmith.io.safetensors import WeightsFile, open_weights
from fluxsmith.train.placement import Span

ROWS = "rows"
DIVIDER = "|"  # between a tensor's name and its optimizer state's name


def rank_file(name: str, rank: int, size: int) -> str:
    """`weights.safetensors` -> `weights-rank0001-of-0002.safetensors` for the process of rank 0."""
    return name.replace(".safetensors", f"-rank{rank + 1:04d}-of-{size:04d}.safetensors")


def span_of(name: str, tensor: Tensor, spans: Mapping[str, Span]) -> Span | None:
    """The rows that a trained tensor, its average or a state of its optimizer stands for; None for what is not dealt out."""
    span = spans.get(name.partition(DIVIDER)[0])
    return span if span is not None and tuple(tensor.shape) == (span.stop - span.start, *span.shape[1:]) else None


def own_part(tensors: Mapping[str, Tensor], spans: Mapping[str, Span], *, is_main: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What this process writes of `tensors`: its rows; the first one also what is not dealt out. With the file's metadata."""
    rows: dict[str, list[int]] = {}
    part: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        span = span_of(name, tensor, spans)
        if span is None and not is_main:
            continue
        if span is not None:
            rows[name] = [span.start, *span.shape]
        part[name] = tensor
    return part, {ROWS: json.dumps(rows)}


class Stored:
    """One kind of tensors of a state, by name, whichever way it was written."""

    def __init__(self, folder: Path, name: str) -> None:
        self.where = str(folder / name)
        pattern = name.replace(".safetensors", "-rank*.safetensors")
        paths = [folder / name] if (folder / name).exists() else sorted(folder.glob(pattern))
        if not paths:
            raise ModelFileError(f"the state has no {name}", where=str(folder), fix="resume from an older state")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.parts: dict[str, list[tuple[int, WeightsFile]]] = {}
        for path in paths:
            self._add(open_weights(path))

    def _add(self, file: WeightsFile) -> None:
        rows = json.loads(file.metadata.get(ROWS, "{}"))
        for name, info in file.infos.items():
            start, *shape = rows.get(name, [0, *info.shape])
            self.shapes[name] = tuple(shape)
            self.parts.setdefault(name, []).append((start, file))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def read(self, name: str, span: Span | None = None) -> Tensor:
        """The tensor, or these rows of it."""
        parts = self.parts[name]
        if span is None and len(parts) == 1:
            return parts[0][1].tensor(name)
        start, stop = (span.start, span.stop) if span is not None else (0, self.shapes[name][0])
        found = []
        for first, file in sorted(parts, key=lambda part: part[0]):
            height = file.infos[name].shape[0]
            low, high = max(start, first), min(stop, first + height)
            if low < high:
                rows = file.tensor(name)
                found.append(rows if high - low == height else rows[low - first : high - first].clone())  # not to hold all of it
        if sum(len(rows) for rows in found) != stop - start:
            raise ModelFileError(f"the state lacks rows of {name}", where=self.where, fix="resume from an older state")
        if not found:
            return parts[0][1].tensor(name)[:0]
        return torch.cat(found) if len(found) > 1 else found[0]

    def read_as(self, name: str, spans: Mapping[str, Span]) -> Tensor:
        """The rows that this process has of a tensor or of an optimizer's state."""
        span = spans.get(name.partition(DIVIDER)[0])
        return self.read(name, span if span is not None and self.shapes[name] == span.shape else None)
