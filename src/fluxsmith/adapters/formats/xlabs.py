"""XLabs: `double_blocks.0.processor.qkv_lora1.down.weight` (1 image, 2 text), `single_blocks.0.processor.proj_lora.down.weight`.

Only attention layers have names here; `qkv_lora` of a single block covers the q, k, v rows of linear1. Strength is 1, no alpha.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fluxsmith.adapters.formats.dotted import folded, no_replacements, only_lora, only_transformer
from fluxsmith.adapters.formats.fused import fuse, take
from fluxsmith.adapters.formats.kinds import sizes
from fluxsmith.adapters.formats.state import AdapterState, LayerState, Part
from fluxsmith.errors import ModelFileError

NAME = re.compile(
    r"(?P<stack>double|single)_blocks\.(?P<index>\d+)\.processor\.(?P<lora>qkv|proj)_lora(?P<stream>[12]?)\.(?P<half>down|up)\.weight$"
)
LAYERS = {  # (stack, lora, stream) -> BFL layer
    ("double", "qkv", "1"): "img_attn.qkv", ("double", "proj", "1"): "img_attn.proj",
    ("double", "qkv", "2"): "txt_attn.qkv", ("double", "proj", "2"): "txt_attn.proj",
    ("single", "qkv", ""): "linear1", ("single", "proj", ""): "linear2",
}  # fmt: skip
NAMES = {(stack, layer): f"processor.{lora}_lora{stream}" for (stack, lora, stream), layer in LAYERS.items()}


def matches(keys: Iterable[str]) -> bool:
    """Are these keys of this format?"""
    return any(NAME.match(key) for key in keys)


def read(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AdapterState:
    """Tensors of a file -> layers. Raises ModelFileError for names and sizes that do not fit."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = NAME.match(key)
        layer = LAYERS.get((found["stack"], found["lora"], found["stream"])) if found else None
        if found is None or layer is None:
            raise ModelFileError(f"{key} is no part of an XLabs LoRA")
        pairs.setdefault(f"dit.{found['stack']}_blocks.{found['index']}.{layer}", {})[found["half"]] = tensor
    return AdapterState({path: _layer(path, pair) for path, pair in pairs.items()}, dict(metadata), "xlabs")


def _layer(path: str, pair: dict[str, Tensor]) -> LayerState:
    found = sizes("lora", path, pair)
    rows, rank = found.rows or 0, float(pair["down"].shape[0])
    height = None if path.endswith("linear1") else rows  # the MLP's rows are not told
    name = "qkv" if height is None else ""
    return LayerState((Part(name, 0, rows, "lora", pair, rank),), height, found.in_features)


def write(state: AdapterState, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Layers -> tensors, no metadata. Raises ModelFileError for layers beside attention and for what changes the MLP rows of linear1."""
    for check in (only_lora, only_transformer, no_replacements):
        check(state, "XLabs' format")
    tensors: dict[str, Tensor] = {}
    for path, layer in state.layers.items():
        stack, index, rest = path.removeprefix("dit.").split(".", 2) if path.count(".") > 2 else ("", "", path)
        name = NAMES.get((stack.removesuffix("_blocks"), rest))
        if name is None:
            raise ModelFileError(f"XLabs' format has no layer {path}", fix="leave all layers but attention out, or choose another format")
        part = folded(_attention_rows(path, layer) if rest == "linear1" else fuse(layer, path))
        for half in ("down", "up"):
            tensors[f"{stack}.{index}.{name}.{half}.weight"] = part.tensors[half].to(dtype or part.tensors[half].dtype)
    return tensors, {}


def _attention_rows(path: str, layer: LayerState) -> Part:
    """The q, k, v rows of linear1. Raises ModelFileError if the rest is adapted too."""
    rows = 3 * layer.parts[0].down.shape[1]
    if layer.out_features is None and layer.parts[0].name != "qkv":
        layer = LayerState(layer.parts, rows, layer.in_features)
    part = layer.parts[0] if layer.parts[0].name == "qkv" else fuse(layer, path)
    if part.up[rows:].any():
        raise ModelFileError(f"XLabs' format holds only q, k and v of {path}, and its MLP rows are adapted too")
    return take(part, [(0, rows)], path)
