"""sd-scripts' names, which ComfyUI, Forge and diffusers read too: `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`.

Every kind of adapter is written here in LyCORIS' words (`lokr_w1`, `hada_w1_a`, `dora_scale`, ...); sd-scripts' own OFT has
`oft_unet_` names.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fluxsmith.adapters.formats.dotted import no_replacements, read_layers, written
from fluxsmith.adapters.formats.naming import find_flat, flat_name, whole
from fluxsmith.adapters.formats.state import AdapterState, LayerState
from fluxsmith.adapters.formats.suffixes import alpha
from fluxsmith.errors import ModelFileError

NAME = re.compile(r"(lora|oft)_(unet|te\d?)_")


def matches(keys: Iterable[str]) -> bool:
    """Are these keys of this format?"""
    return any(NAME.match(key) for key in keys)


def read(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AdapterState:
    """Tensors of a file -> layers. Raises ModelFileError for names and sizes that do not fit."""
    return read_layers(tensors, metadata, find_flat, name="kohya")


def write(state: AdapterState, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Layers -> tensors and format metadata (none). Fused layers become one adapter with exactly the same effect.

    `dtype` None keeps the tensors' own. Raises ModelFileError for kinds that have no such form.
    """
    no_replacements(state, "sd-scripts' format")
    tensors: dict[str, Tensor] = {}
    for path, layer in state.layers.items():
        if any(part.kind == "oft" for part in layer.parts):
            tensors |= _rotations(path, layer, dtype)
        else:
            tensors |= written([(flat_name(path), whole(path, layer))], "down_up", dtype, folds=False)
    return tensors, {}


def _rotations(path: str, layer: LayerState, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """sd-scripts' OFT; in a text encoder, where sd-scripts has none, with the same pattern of names."""
    if {part.kind for part in layer.parts} != {"oft"} or len({part.alpha for part in layer.parts}) > 1:
        raise ModelFileError(f"{path} mixes OFT with {layer.kind} or with another constraint, which sd-scripts' format cannot say")
    name = flat_name(path, "oft")
    made = {
        f"{name}.oft_blocks.{index}": part.tensors["blocks"].to(dtype or part.tensors["blocks"].dtype)
        for index, part in enumerate(layer.parts)
    }
    return {**made, f"{name}.alpha": alpha(layer.parts[0])}
