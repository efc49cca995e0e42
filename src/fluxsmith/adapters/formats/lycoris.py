"""LyCORIS around a diffusers model (SimpleTuner, older ai-toolkit): `lycoris_<diffusers layer, underscores>.lokr_w1` and the like."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fluxsmith.adapters.formats.dotted import no_replacements, read_layers, written
from fluxsmith.adapters.formats.naming import find_flat
from fluxsmith.adapters.formats.onetrainer import named_flat
from fluxsmith.adapters.formats.state import AdapterState

PREFIXES = {"dit": "lycoris_", "clip_l": "lycoris_te1_", "t5xxl": "lycoris_te3_"}


def matches(keys: Iterable[str]) -> bool:
    """Are these keys of this format?"""
    return any(key.startswith("lycoris_") for key in keys)


def read(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AdapterState:
    """Tensors of a file -> layers. Raises ModelFileError for names and sizes that do not fit."""
    return read_layers(tensors, metadata, find_flat, name="lycoris")


def write(state: AdapterState, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Layers -> tensors, no metadata. Raises ModelFileError for layers and kinds that cannot be said in diffusers' names."""
    no_replacements(state, "LyCORIS' format")
    return written(named_flat(state, PREFIXES), "down_up", dtype, folds=False), {}
