"""Adapter files as a whole: which format a file has, reading it, and writing one durably with a verdict on where it loads.

`state = read_adapter("cats.safetensors")`; `write_adapter("cats.safetensors", state, format="kohya", metadata={...})`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from fluxsmith.adapters.formats import kohya, peft
from fluxsmith.adapters.formats.state import AdapterState
from fluxsmith.adapters.formats.verdict import Verdict, verdict
from fluxsmith.errors import ModelFileError
from fluxsmith.io.durable import Disk
from fluxsmith.io.identify import identify
from fluxsmith.io.metadata import with_hashes
from fluxsmith.io.safetensors import WeightsFile, open_weights, save_weights

Format = Literal["kohya", "peft"]
READERS = {  # key style as io/identify.py names it -> format module
    "kohya": kohya,
    "onetrainer": kohya,
    "peft": peft,
    "comfy_bfl": peft,
    "bfl_peft": peft,
    "bfl": peft,
    "diffusers": peft,
    "diffsynth": peft,
}
WRITERS = {"kohya": kohya, "peft": peft}


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
    if found.variant != "lora" or found.key_style not in READERS:
        what = f"adapters of kind {found.variant} in {found.key_style} names cannot be read yet"
        raise ModelFileError(what, where=where, fix="use a LoRA in sd-scripts, diffusers, ComfyUI, OneTrainer or DiffSynth names")
    try:
        state = READERS[found.key_style].read({name: weights.tensor(name) for name in weights}, weights.metadata)
    except ModelFileError as error:
        problem = error.problems[0]
        raise ModelFileError(problem.what, where=where, why=problem.why, fix=problem.fix or "get a complete file") from error
    return AdapterState(state.layers, state.metadata, found.key_style)


def write_adapter(
    path: str | os.PathLike[str],
    state: AdapterState,
    *,
    format: Format = "kohya",
    dtype: torch.dtype = torch.bfloat16,
    metadata: Mapping[str, str] | None = None,
    disk: Disk | None = None,
) -> Verdict:
    """Write the file durably, read its header again and say where it loads. Raises StorageError, ModelFileError."""
    tensors, extra = WRITERS[format].write(state, dtype)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_weights(path, tensors, with_hashes(tensors, {"format": "pt", **(metadata or {}), **extra}), disk=disk)
    return verdict(Path(path))
