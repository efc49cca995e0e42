"""The rank of a LoRA changed: each layer's product decomposed exactly through its factors and cut, with its strength kept.

`resize(ResizeRequest("cats.safetensors", Path("cats-r8.safetensors"), rank=8))`, or by the sizes of the singular values with
`method` ratio, energy or sum, which count as sd-scripts' sv_ratio, sv_fro and sv_cumulative do.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fluxsmith.adapters.formats.files import write_adapter
from fluxsmith.adapters.formats.state import AdapterState, LayerState, Part
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.io.durable import Disk
from fluxsmith.tools.adapter_file import DYNAMIC, RANK_ENTRIES, adapter, format_named, format_of, rewritten
from fluxsmith.tools.low_rank import svd_of_product, weighted_left
from fluxsmith.tools.model_file import Given
from fluxsmith.tools.outputs import dtype_of, make_room, target_path

Method = Literal["ratio", "energy", "sum"]
SMALLEST = 1e-6  # largest singular value of a layer that does nothing


@dataclass(frozen=True)
class ResizeRequest:
    """Which file, and how large it is to become."""

    source: Given
    target: Path
    rank: int
    """The new rank; the largest one with a method. Layers that have less keep theirs."""
    method: Method | None = None
    """None: `rank` for all. ratio: values above the largest / parameter. energy: values whose squares make up parameter squared of all
    squares. sum: values that make up the share `parameter` of their sum. Each keeps one value more than that."""
    parameter: float | None = None
    format: str | None = None
    dtype: str = "keep"
    device: str = "cpu"
    has_metadata: bool = True
    overwrite: bool = False


class Resized(NamedTuple):
    """One layer (or its part q, k, v): ranks, and shares of the sum and of the Frobenius norm of its singular values that are kept."""

    path: str
    before: int
    rank: int
    sum: float
    norm: float


@dataclass(frozen=True)
class ResizeReport:
    """What was written."""

    target: str
    layers: tuple[Resized, ...]
    verdict: str

    @property
    def kept(self) -> tuple[float, float]:
        """Mean and smallest share of the norm."""
        shares = [layer.norm for layer in self.layers] or [1.0]
        return sum(shares) / len(shares), min(shares)

    def as_record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self) | {"layers": [layer._asdict() for layer in self.layers], "kept_mean": self.kept[0], "kept_least": self.kept[1]}


def resize(request: ResizeRequest, *, disk: Disk | None = None) -> ResizeReport:
    """Write the resized file. Raises ModelFileError for other kinds than LoRA, ConfigError for settings, StorageError."""
    _check(request)
    disk, dtype, target = disk or Disk(), dtype_of(request.dtype), target_path(request.target, overwrite=request.overwrite)
    state = adapter(request.source)
    form = format_named(request.format) if request.format else format_of(state)
    reports: list[Resized] = []
    layers: dict[str, LayerState] = {}
    for path, layer in state.layers.items():
        parts = []
        for part in layer.parts:
            made, report = _resized(path, part, request)
            parts.append(made)
            reports.append(report)
        layers[path] = LayerState(tuple(parts), layer.out_features, layer.in_features)
    made_state = AdapterState(layers, state.metadata, state.format, state.replaced)
    metadata = rewritten(made_state, form, _entries(request, state.metadata)) if request.has_metadata else {}
    make_room(target, disk)
    verdict = write_adapter(target, made_state, format=form, dtype=dtype, metadata=metadata, disk=disk)
    return ResizeReport(str(target), tuple(reports), verdict.text)


def _entries(request: ResizeRequest, metadata: Mapping[str, str]) -> dict[str, str]:
    """The comment says what was done; a rank by method is called dynamic, as sd-scripts does."""
    how = f"rank {request.rank}" if request.method is None else f"{request.method} {request.parameter:g}, rank at most {request.rank}"
    comment = f"resized to {how}; {metadata.get('ss_training_comment', '')}".removesuffix("; ")
    dynamic = dict.fromkeys((key for key in RANK_ENTRIES if key in metadata), DYNAMIC) if request.method else {}
    return {"ss_training_comment": comment, **dynamic}


def _check(request: ResizeRequest) -> None:
    method, value = request.method, request.parameter
    if request.rank < 1:
        raise ConfigError(f"rank {request.rank} is below 1", fix="give 4 to 128")
    if (method is None) != (value is None):
        raise ConfigError("a method and its parameter come together", fix="give both, or neither")
    if method == "ratio" and value is not None and value < 2:
        raise ConfigError(f"ratio {value:g} is below 2", fix="give 2 or more")
    if method in ("energy", "sum") and value is not None and not 0 < value <= 1:
        raise ConfigError(f"{method} {value:g} is no share", fix="give a number above 0, at most 1")


def _resized(path: str, part: Part, request: ResizeRequest) -> tuple[Part, Resized]:
    if part.kind != "lora" or "magnitude" in part.tensors:
        kind = "dora" if "magnitude" in part.tensors else part.kind
        why = "its norms belong to its factors" if kind == "dora" else "it has no pair of factors"
        fix = "merge it into its model and extract a LoRA of the wanted rank"
        raise ModelFileError(f"{path} is {kind}, which has no rank to change", where=str(request.source), why=why, fix=fix)
    dtype, name = part.up.dtype, f"{path}:{part.name}" if part.name else path
    found = svd_of_product(part.up.to(request.device), part.down.to(request.device))
    rank = min(count(found.values, request), len(found.values))
    up, down = weighted_left(found.first(rank))
    tensors = {**part.tensors, "up": _stored(up, dtype), "down": _stored(down, dtype)}
    kept, all_values = found.values[:rank].double(), found.values.double()
    shares = (float(kept.sum() / all_values.sum()), float(kept.norm() / all_values.norm())) if all_values.any() else (1.0, 1.0)
    return part.having(tensors=tensors, alpha=part.alpha / part.rank * rank), Resized(name, part.rank, rank, *shares)


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.cpu().contiguous().to(dtype)


def count(values: Tensor, request: ResizeRequest) -> int:
    """How many of the singular values (descending) to keep, as sd-scripts' resize_lora counts them."""
    if float(values[0]) <= SMALLEST:
        return 1
    if request.method is None or request.parameter is None:
        return request.rank
    return min(COUNTS[request.method](values.double(), request.parameter) + 1, request.rank)


def _by_ratio(values: Tensor, parameter: float) -> int:
    return _bounded(int((values > values[0] / parameter).sum()), values)


def _by_energy(values: Tensor, parameter: float) -> int:
    return _reaching(values.square(), parameter**2)


def _by_sum(values: Tensor, parameter: float) -> int:
    return _reaching(values, parameter)


def _reaching(values: Tensor, share: float) -> int:
    """Leading values whose sum reaches a share of all."""
    sums = values.cumsum(0) / values.sum()
    return _bounded(int((sums < share).sum()) + 1, values)


def _bounded(number: int, values: Tensor) -> int:
    return max(1, min(number, len(values) - 1))


COUNTS: Mapping[str, Callable[[Tensor, float], int]] = {"ratio": _by_ratio, "energy": _by_energy, "sum": _by_sum}
