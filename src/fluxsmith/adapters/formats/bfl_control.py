"""BFL's control LoRAs (canny, depth): bare BFL names, `lora_A`, `lora_B` and `lora_B.bias`, and norm scales as they are.

The scales replace the model's at any strength. img_in takes 128 channels: noise tokens, then the tokens of the control image.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fluxsmith.adapters.formats.dotted import only_lora, only_transformer, read_layers, written
from fluxsmith.adapters.formats.naming import find, whole
from fluxsmith.adapters.formats.state import AdapterState

NAME = re.compile(r"(double_blocks|single_blocks|img_in|final_layer)\b.*lora_B\.bias$")
SCALE = re.compile(r"(double_blocks|single_blocks)\.\d+\..*norm\.(query|key)_norm\.scale$")


def matches(keys: Iterable[str]) -> bool:
    """Are these keys of this format?"""
    return any(NAME.match(key) for key in keys)


def read(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AdapterState:
    """Tensors of a file -> layers and replaced scales. Raises ModelFileError for names and sizes that do not fit."""
    scales = {f"dit.{key}": tensor for key, tensor in tensors.items() if SCALE.match(key)}
    state = read_layers({key: tensor for key, tensor in tensors.items() if not SCALE.match(key)}, metadata, find, name="bfl_control")
    return AdapterState(state.layers, state.metadata, "bfl_control", scales)


def write(state: AdapterState, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Layers -> tensors, no metadata; layers without a bias get none. Raises ModelFileError for other kinds and text encoders."""
    only_transformer(state, "BFL's control format")
    only_lora(state, "BFL's control format", bias=True)
    named = ((path.removeprefix("dit."), whole(path, layer)) for path, layer in state.layers.items())
    tensors = written(named, "a_b", dtype, folds=True)
    return tensors | {path.removeprefix("dit."): scale.to(dtype or scale.dtype) for path, scale in state.replaced.items()}, {}
