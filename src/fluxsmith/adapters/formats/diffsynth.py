"""DiffSynth-Studio's training files: `blocks.0.attn.a_to_qkv.lora_A.default.weight`, strength folded in, no alpha."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fluxsmith.adapters.formats.dotted import no_replacements, only_lora, only_transformer, read_layers, written
from fluxsmith.adapters.formats.naming import DIFFSYNTH, find, whole
from fluxsmith.adapters.formats.state import AdapterState
from fluxsmith.errors import ModelFileError

NAME = re.compile(r".*\.lora_[AB]\.default\.weight$")


def matches(keys: Iterable[str]) -> bool:
    """Are these keys of this format?"""
    return any(NAME.match(key) for key in keys)


def read(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AdapterState:
    """Tensors of a file -> layers. Raises ModelFileError for names and sizes that do not fit."""
    return read_layers(tensors, metadata, find, name="diffsynth")


def write(state: AdapterState, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Layers -> tensors, no metadata. Raises ModelFileError for other kinds than LoRA and for text encoders."""
    only_lora(state, "DiffSynth's format")
    only_transformer(state, "DiffSynth's format")
    no_replacements(state, "DiffSynth's format")
    named = []
    for path, layer in state.layers.items():
        names = DIFFSYNTH.layer(path.removeprefix("dit."))
        if names is None:
            raise ModelFileError(f"DiffSynth has no layer like {path}")
        named.append((names[0], whole(path, layer)))
    return written(named, "a_b_default", dtype, folds=True), {}
