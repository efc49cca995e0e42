"""PEFT over a model with BFL's names: `base_model.model.<BFL layer>.lora_A.weight`, strength folded in, no header entry."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fluxsmith.adapters.formats.dotted import no_replacements, only_lora, only_transformer, read_layers, written
from fluxsmith.adapters.formats.naming import find, whole
from fluxsmith.adapters.formats.state import AdapterState

PREFIX = "base_model.model."


def matches(keys: Iterable[str]) -> bool:
    """Are these keys of this format?"""
    return any(key.startswith(PREFIX) for key in keys)


def read(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AdapterState:
    """Tensors of a file -> layers. Raises ModelFileError for names and sizes that do not fit."""
    return read_layers(tensors, metadata, find, name="bfl_peft")


def write(state: AdapterState, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Layers -> tensors, no metadata. Raises ModelFileError for other kinds than LoRA and for text encoders."""
    only_lora(state, "the base_model.model format", dora=True, bias=True)
    only_transformer(state, "the base_model.model format")
    no_replacements(state, "the base_model.model format")
    named = ((PREFIX + path.removeprefix("dit."), whole(path, layer)) for path, layer in state.layers.items())
    return written(named, "a_b", dtype, folds=True), {}
