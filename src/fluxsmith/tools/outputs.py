"""What tools write: types by name, casts that cannot make infinities out of weights, targets that are not written over by accident."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fluxsmith.errors import ConfigError
from fluxsmith.io.durable import Disk
from fluxsmith.io.identity import Identity
from fluxsmith.io.metadata import ModelSpec, modelspec

Dtype = Literal["keep", "fp32", "fp16", "bf16", "fp8", "fp8_e5m2"]
DTYPES: Mapping[str, torch.dtype | None] = {
    "keep": None,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
BESIDE_FP8 = torch.bfloat16  # biases and norm scales of an 8-bit file
STALE = ("sshs_", "modelspec.hash_sha256", "modelspec.date", "lora_adapter_metadata")  # entries that are no longer true of a new file


def dtype_of(name: str) -> torch.dtype | None:
    """The type that a name means; None for `keep`. Raises ConfigError."""
    if name not in DTYPES:
        raise ConfigError(f"there is no type {name!r} to write", fix=f"use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def written_dtype(kept: torch.dtype, shape: Sequence[int], wanted: torch.dtype | None) -> torch.dtype:
    """The type of one tensor: 8 bits are for weights only, vectors beside them stay in 16; integers are not touched."""
    if wanted is None or not kept.is_floating_point:
        return kept
    return BESIDE_FP8 if wanted.itemsize == 1 and len(shape) < 2 else wanted


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """To another type; what is beyond the range of a narrow one becomes its largest value instead of infinity or NaN."""
    if tensor.dtype == dtype:
        return tensor
    if dtype.is_floating_point and torch.finfo(dtype).max < torch.finfo(torch.float32).max and tensor.dtype.itemsize > 1:
        limit = torch.finfo(dtype).max
        tensor = tensor.clamp(-limit, limit)
    return tensor.to(dtype)


def target_path(given: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """Where to write. Raises ConfigError for a name without .safetensors, a folder, and a file that is there unless `overwrite`."""
    path = Path(given).expanduser()
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} is no .safetensors file", fix=f"write to {path.with_suffix('.safetensors')}")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder", fix="give the name of a file")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} is there already", fix="choose another name, or add --overwrite")
    return path


def make_room(path: Path, disk: Disk) -> None:
    """The folder of a target."""
    disk.make_folder(path.absolute().parent)


def fresh(metadata: Mapping[str, str]) -> dict[str, str]:
    """A file's entries without those that a new file makes untrue."""
    return {key: value for key, value in metadata.items() if not key.startswith(STALE)}


def model_metadata(identity: Identity, entries: Mapping[str, str], title: str, merged_from: str) -> dict[str, str]:
    """Metadata of a model made from others: the first one's own entries, with a new title, date and `merged_from`."""
    entries = fresh(entries)
    chain = " + ".join(text for text in (entries.get("modelspec.merged_from", ""), merged_from) if text)
    spec = (
        modelspec(ModelSpec(title, identity.variant or "dev", adapter="", merged_from=chain))
        if identity.role in ("dit", "checkpoint")
        else {}
    )
    kept = {key: value for key, value in entries.items() if key not in ("modelspec.title", "modelspec.merged_from", "format")}
    return {"format": "pt", **spec, **kept} | ({"fluxsmith.merged_from": chain} if chain and not spec else {})
