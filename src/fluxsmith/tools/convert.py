"""Adapter files in other key names, and models in the original release's: nothing is computed that is not needed.

`convert(ConvertRequest("cats.safetensors", Path("cats-diffusers.safetensors"), to="peft"))` finds out what the source is by itself.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fluxsmith.adapters.formats.files import write_adapter
from fluxsmith.adapters.formats.state import AdapterState
from fluxsmith.errors import ConfigError
from fluxsmith.io.durable import Disk
from fluxsmith.io.safetensors import Lazy, save_weights
from fluxsmith.tools.adapter_file import adapter, format_named, format_of, rewritten
from fluxsmith.tools.model_file import Given, ModelFile, model_file
from fluxsmith.tools.outputs import cast, dtype_of, make_room, model_metadata, target_path, written_dtype

Progress = Callable[[int, int, str], None]
READ_ALIKE = {"ai_toolkit": "peft", "peft": "ai_toolkit"}  # the same names; a header entry tells them apart


@dataclass(frozen=True)
class ConvertRequest:
    """Which adapter file, and in which names."""

    source: Given
    target: Path
    to: str = "kohya"
    expects: str | None = None
    """The source must be in this format; None takes any."""
    base: Given | None = None
    """The model it is for: needed where a file does not tell a layer's size (XLabs)."""
    dtype: str = "keep"
    has_metadata: bool = True
    overwrite: bool = False


@dataclass(frozen=True)
class ConvertReport:
    """What was converted."""

    source_format: str
    target: str
    format: str
    layers: int
    bytes_before: int
    bytes_after: int
    rounded: bool
    """Strengths were folded into factors of 16 bits or fewer, which rounds them once more."""
    verdict: str

    def as_record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def convert(request: ConvertRequest, *, disk: Disk | None = None) -> ConvertReport:
    """Write the file in other names. Raises ModelFileError with the reason where there is no exact form, ConfigError, StorageError."""
    form, dtype, disk = format_named(request.to), dtype_of(request.dtype), disk or Disk()
    target = target_path(request.target, overwrite=request.overwrite)
    state = adapter(request.source, request.base)
    found = format_of(state)
    if request.expects is not None and found not in (request.expects, READ_ALIKE.get(request.expects)):
        raise ConfigError(f"{request.source} is in {found} names, {request.expects} was said", fix=f"say that it is {found}")
    metadata = rewritten(state, form) if request.has_metadata else {}
    make_room(target, disk)
    verdict = write_adapter(target, state, format=form, dtype=dtype, metadata=metadata, disk=disk)
    before = Path(request.source).stat().st_size if Path(request.source).is_file() else 0
    rounded = dtype is None and form in FOLDING and any(_rounds(state))
    return ConvertReport(found, str(target), form, len(state.layers), before, target.stat().st_size, rounded, verdict.text)


FOLDING = ("peft", "ai_toolkit", "bfl_peft", "diffsynth", "xlabs", "bfl_control")  # formats without alpha


def _rounds(state: AdapterState) -> list[bool]:
    """Is there a factor of few bits whose strength is no power of two?"""
    parts = [part for layer in state.layers.values() for part in layer.parts if part.kind == "lora"]
    return [part.up.dtype.itemsize < 4 and _mantissa(part.scale) != 0.5 for part in parts]


def _mantissa(value: float) -> float:
    return float(torch.frexp(torch.tensor(abs(value), dtype=torch.float64)).mantissa)


@dataclass(frozen=True)
class ModelConvertRequest:
    """A model as one file in the original release's names."""

    source: Given
    """A file, shards, a diffusers folder, an all-in-one checkpoint, or a hub id."""
    target: Path
    role: str = "dit"
    """dit, clip_l, t5xxl or ae."""
    dtype: str = "keep"
    overwrite: bool = False


def convert_model(request: ModelConvertRequest, progress: Progress = lambda *_: None, *, disk: Disk | None = None) -> dict[str, Any]:
    """Write it, tensor by tensor. Weights in 8 bits with scales are written out as bf16 unless another type is asked for."""
    dtype, disk = dtype_of(request.dtype), disk or Disk()
    target = target_path(request.target, overwrite=request.overwrite)
    with model_file(request.source, request.role) as file:
        total = len(file.shapes)
        tensors = {key: _lazy(file, key, dtype, (number, total, progress)) for number, key in enumerate(file.shapes)}
        make_room(target, disk)
        metadata = model_metadata(file.identity, file.weights.metadata, target.stem, "")
        record = save_weights(target, tensors, metadata, disk=disk)
        found = file.identity.describe()
    return {"target": str(target), "source": found, "tensors": total, "bytes": record.size}


def _lazy(file: ModelFile, key: str, dtype: torch.dtype | None, told: tuple[int, int, Progress]) -> Lazy:
    chosen = written_dtype(file.dtype(key), file.shapes[key], dtype)

    def make() -> torch.Tensor:
        number, total, progress = told
        progress(number, total, key)
        return cast(file.read(key), chosen).contiguous()

    return Lazy(chosen, file.shapes[key], make)
