"""sd-scripts' names, which ComfyUI, Forge and diffusers read too: `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`.

Also read: OneTrainer's `lora_transformer_<diffusers layer>`. Names come from fixed tables, never from a model in memory.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fluxsmith.adapters.formats.pairs import grouped, in_bfl_order, layers_from, pair
from fluxsmith.adapters.formats.state import AdapterState, fuse
from fluxsmith.adapters.targets import CLIP_LAYERS, T5_LAYERS
from fluxsmith.errors import ModelFileError
from fluxsmith.io.keymaps import MAPS, LayerMap, Place

PREFIXES = {"dit": "lora_unet_", "clip_l": "lora_te1_", "t5xxl": "lora_te3_"}
TABLE = MAPS["diffusers"]
BFL = LayerMap(  # BFL names onto themselves
    "double_blocks.", "single_blocks.",
    {name: (name,) for name in TABLE.double_layers}, {name: (name,) for name in TABLE.single_layers},
    {name: (name,) for name in TABLE.outer_layers}, {}, {},
)  # fmt: skip
CLIP_NAME = re.compile(r"lora_te1_(?:text_model_)?encoder_layers_(\d+)_(.+)")
T5_NAME = re.compile(r"lora_te[23]_encoder_block_(\d+)_(.+)")


def _flat(name: str) -> str:
    return name.replace(".", "_")


def dotted(table: LayerMap, flat: str) -> str | None:
    """The dotted layer name of a table that an underscored one stands for."""
    for prefix, layers in ((table.double_prefix, table.double_layers), (table.single_prefix, table.single_layers)):
        found = re.fullmatch(re.escape(_flat(prefix)) + r"(\d+)_(.+)", flat)
        if found:
            leaf = next((name for names in layers.values() for name in names if _flat(name) == found[2]), None)
            return f"{prefix}{found[1]}.{leaf}" if leaf else None
    return next((name for names in table.outer_layers.values() for name in names if _flat(name) == flat), None)


def place_of(name: str) -> Place | None:
    """`lora_unet_...`, `lora_te1_...`, `lora_te3_...`, `lora_transformer_...` -> the layer (part) it means."""
    for prefix, table in (("lora_unet_", BFL), ("lora_transformer_", TABLE)):
        if name.startswith(prefix):
            layer = dotted(table, name.removeprefix(prefix))
            place = table.bfl_layer(layer) if layer else None
            return place._replace(name=f"dit.{place.name}") if place else None
    for pattern, stem, leaves in (
        (CLIP_NAME, "clip_l.text_model.encoder.layers", CLIP_LAYERS),
        (T5_NAME, "t5xxl.encoder.block", T5_LAYERS),
    ):
        found = pattern.fullmatch(name)
        if found:
            leaf = next((leaf for leaf in leaves if _flat(leaf) == found[2]), None)
            return Place(f"{stem}.{found[1]}.{leaf}") if leaf else None
    return None


def name_of(path: str) -> str:
    """A layer path in sd-scripts' naming. Raises ModelFileError for a path of no known role."""
    role, _, rest = path.partition(".")
    if role not in PREFIXES:
        raise ModelFileError(f"{path} has no name in sd-scripts' format")
    return PREFIXES[role] + _flat(rest)


def read(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AdapterState:
    """Tensors of a file -> layers. Raises ModelFileError for names and sizes that do not fit."""
    pairs = [pair(name, place_of(name), own) for name, own in grouped(tensors).items()]
    layers = layers_from(in_bfl_order(item, TABLE) if item.name.startswith("lora_transformer_") else item for item in pairs)
    return AdapterState(layers, dict(metadata), "kohya")


def write(state: AdapterState, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Layers -> tensors and format metadata (none). Fused layers become one pair with exactly the same product."""
    tensors: dict[str, Tensor] = {}
    for path, layer in state.layers.items():
        name, whole = name_of(path), fuse(layer)
        tensors[f"{name}.lora_down.weight"] = whole.down.to(dtype)
        tensors[f"{name}.lora_up.weight"] = whole.up.to(dtype)
        tensors[f"{name}.alpha"] = torch.tensor(whole.alpha, dtype=torch.float32)
    return tensors, {}
