"""OneTrainer: `lora_transformer_<diffusers layer, underscores>.lora_down.weight` with alpha.

Text encoders are lora_te1_ and lora_te2_ (T5).
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fluxsmith.adapters.formats.dotted import no_replacements, read_layers, written
from fluxsmith.adapters.formats.naming import find_flat, flat, in_diffusers
from fluxsmith.adapters.formats.state import AdapterState, Part

PREFIXES = {"dit": "lora_transformer_", "clip_l": "lora_te1_", "t5xxl": "lora_te2_"}
NAME = re.compile(r"lora_transformer_")


def matches(keys: Iterable[str]) -> bool:
    """Are these keys of this format?"""
    return any(NAME.match(key) for key in keys)


def read(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AdapterState:
    """Tensors of a file -> layers. Raises ModelFileError for names and sizes that do not fit."""
    return read_layers(tensors, metadata, find_flat, name="onetrainer")


def write(state: AdapterState, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Layers -> tensors, no metadata. Raises ModelFileError for layers and kinds that cannot be said in diffusers' names."""
    no_replacements(state, "OneTrainer's format")
    return written(named_flat(state, PREFIXES), "down_up", dtype, folds=False), {}


def named_flat(state: AdapterState, prefixes: Mapping[str, str]) -> list[tuple[str, Part]]:
    """Underscored names of diffusers with their parts."""
    return [
        (prefixes[path.split(".", 1)[0]] + flat(name), part)
        for path, layer in state.layers.items()
        for name, part in in_diffusers(path, layer)
    ]
