"""Adapter files as a whole: which format a file has, reading it, writing one durably with a verdict, and converting.

`state = read_adapter("cats.safetensors")`; `write_adapter("cats.safetensors", state, format="kohya", metadata={...})`;
`tensors, metadata = convert(state, "ai_toolkit")`. FORMATS are the names that can be written; every one can be read.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from fluxsmith.adapters.formats import (
    ai_toolkit,
    bfl_control,
    bfl_peft,
    comfy,
    diffsynth,
    kohya,
    lycoris,
    onetrainer,
    peft,
    xlabs,
)
from fluxsmith.adapters.formats.state import AdapterState
from fluxsmith.adapters.formats.verdict import Verdict, verdict
from fluxsmith.errors import ModelFileError
from fluxsmith.io.durable import Disk
from fluxsmith.io.identify import identify
from fluxsmith.io.metadata import with_hashes
from fluxsmith.io.safetensors import WeightsFile, open_weights, save_weights

Format = Literal[
    "kohya", "peft", "ai_toolkit", "comfy", "onetrainer", "bfl_peft", "lycoris", "diffsynth", "xlabs", "bfl_control"
]  # fmt: skip


class FileFormat(Protocol):
    """What a format module has."""

    def matches(self, keys: list[str]) -> bool:
        """Are these keys of this format?"""
        ...

    def read(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AdapterState:
        """Tensors of a file -> layers."""
        ...

    def write(self, state: AdapterState, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Layers -> tensors and metadata entries."""
        ...


READERS: Mapping[str, FileFormat] = {  # key style as io/identify.py names it -> format module
    "kohya": kohya,
    "onetrainer": onetrainer,
    "lycoris": lycoris,
    "peft": peft,
    "comfy_bfl": comfy,
    "bfl_peft": bfl_peft,
    "bfl": comfy,
    "diffusers": peft,
    "diffsynth": diffsynth,
    "xlabs": xlabs,
    "bfl_control": bfl_control,
}
FORMATS: Mapping[str, FileFormat] = {
    "kohya": kohya,
    "peft": peft,
    "ai_toolkit": ai_toolkit,
    "comfy": comfy,
    "onetrainer": onetrainer,
    "bfl_peft": bfl_peft,
    "lycoris": lycoris,
    "diffsynth": diffsynth,
    "xlabs": xlabs,
    "bfl_control": bfl_control,
}


def read_adapter(path: str | os.PathLike[str]) -> AdapterState:
    """Read an adapter file of any known format. Raises ModelFileError that names the file and what is wrong."""
    with open_weights(path) as weights:
        return read_open(weights)


def read_open(weights: WeightsFile) -> AdapterState:
    """As `read_adapter`, from an open file."""
    where = str(weights.paths[0])
    found = identify(weights)
    if found.role != "lora":
        raise ModelFileError(f"this is {found.describe()}, an adapter was expected", where=where, fix="give an adapter file")
    if found.unusable:
        raise ModelFileError(found.unusable[0], where=where, fix="get the adapter for FLUX.1")
    if found.key_style not in READERS:
        first = next(iter(weights), "")
        raise ModelFileError(f"adapters with such names cannot be read: {first}", where=where, fix="convert it to sd-scripts' names")
    try:
        state = READERS[found.key_style].read({name: weights.tensor(name) for name in weights}, weights.metadata)
    except ModelFileError as error:
        problem = error.problems[0]
        raise ModelFileError(problem.what, where=where, why=problem.why, fix=problem.fix or "get a complete file") from error
    return replace(state, format=found.key_style)


def with_heights(state: AdapterState, heights: Mapping[str, int]) -> AdapterState:
    """The same with the output rows of layers that the file does not tell; `heights` by layer path, from the base model's header."""
    layers = {
        path: layer if layer.out_features is not None else replace(layer, out_features=heights.get(path))
        for path, layer in state.layers.items()
    }
    return replace(state, layers=layers)


def convert(state: AdapterState, to: str, *, dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the format's metadata entries in another format, with exactly the same effect.

    `dtype` None keeps every tensor's own. Raises ModelFileError with the reason where no exact form exists, and for an unknown format.
    """
    if to not in FORMATS:
        raise ModelFileError(f"there is no adapter format {to!r}", fix=f"use one of {', '.join(FORMATS)}")
    return FORMATS[to].write(_widened(state) if dtype == torch.float32 else state, dtype)


def _widened(state: AdapterState) -> AdapterState:
    """The same in fp32, so that factors which a format folds in are not rounded to 16 bits on the way."""
    layers = {}
    for path, layer in state.layers.items():
        parts = [
            part.having(tensors={name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in part.tensors.items()})
            for part in layer.parts
        ]
        layers[path] = replace(layer, parts=tuple(parts))
    return replace(state, layers=layers)


def write_adapter(
    path: str | os.PathLike[str],
    state: AdapterState,
    *,
    format: Format = "kohya",
    dtype: torch.dtype | None = torch.bfloat16,
    metadata: Mapping[str, str] | None = None,
    disk: Disk | None = None,
) -> Verdict:
    """Write the file durably, read its header again and say where it loads. Raises StorageError, ModelFileError."""
    tensors, extra = convert(state, format, dtype=dtype)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_weights(path, tensors, with_hashes(tensors, {"format": "pt", **(metadata or {}), **extra}), disk=disk)
    return verdict(Path(path))
