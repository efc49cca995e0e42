"""Transformers of the FLUX family: which naming, which member, and is everything there. Structure only, no full-size numbers.

What tells members apart: the guidance embedder, the input channels (64, 128, 196, 384), extra parts (Chroma, Step1X, Nexus-Gen).
"""

import re
from collections.abc import Iterable
from typing import Any

from fluxsmith.io.header import TensorInfo
from fluxsmith.io.identity import Identity, Infos, first_few, indices, side
from fluxsmith.io.keymaps import MAPS, bfl_keys
from fluxsmith.io.keymaps.comfy import DIT_PREFIXES
from fluxsmith.io.keymaps.recipe import LayerMap, Recipe

MARKS = {  # a key that only this naming has
    "bfl": re.compile(r"(double_blocks\.\d+\.(img|txt)_attn\.qkv|single_blocks\.\d+\.linear1)\.(weight|bias)"),
    "diffusers": re.compile(r"(transformer_blocks\.\d+\.attn\.add_k_proj|single_transformer_blocks\.\d+\.proj_mlp)\.(weight|bias)"),
    "diffsynth": re.compile(r"(blocks\.\d+\.attn\.a_to_qkv|single_blocks\.\d+\.to_qkv_mlp)\.(weight|bias)"),
}
SCALES = re.compile(r"(^|\.)(scale_weight|scale_input|scaled_fp8|weight_scale|input_scale|weight_scale_2|comfy_quant)$")
QUANTISED = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*|SCB|qweight|qzeros|scales|_data|_scale)$")
EXTRA_PARTS = {"step1x": ("connector.",), "nexus_gen": ("adapter.", "embedding_merger.")}
PART_ROLES = {"connector.": "connector", "adapter.": "generation_adapter", "embedding_merger.": "editing_adapter"}
IN_CHANNELS = {64: "", 128: "canny-depth", 384: "fill"}  # packed latents; structure of the published members
FLEX2_CHANNELS = 196
TABLE = MAPS["diffusers"]  # its left sides are the BFL layer and key names


def identify_dit(infos: Infos) -> Identity | None:
    """The transformer in a file, or None."""
    for prefix in ("", *DIT_PREFIXES):
        names = [name[len(prefix) :] for name in infos if name.startswith(prefix)]
        style = next((style for style, mark in MARKS.items() if any(mark.fullmatch(name) for name in names)), None)
        if style is not None:
            return _identity(infos, prefix, style)
    return None


def _identity(infos: Infos, prefix: str, style: str) -> Identity:
    others = [name for name in infos if not name.startswith(prefix)]
    parts = parts_of(infos, prefix)
    if style == "diffsynth" and parts.keys() & {"generation_adapter", "editing_adapter"}:
        style = "nexus_gen"  # only there the final modulation is stored in another order
    recipes = bfl_keys((name for name in infos if not _is_scale(name)), style, prefix)
    known = {key: recipe for key, recipe in recipes.items() if style != "bfl" or is_bfl_key(key)}
    shapes = canonical_shapes(known, infos)
    sizes = dit_sizes(shapes) | ({"parts": parts} if parts else {})
    bare = {name[len(prefix) :] for name in infos if name.startswith(prefix)}
    family, variant = _member(shapes, bare | set(others))
    used = {key for recipe in known.values() for key in recipe.keys}
    extra = [name for name in infos if name not in used and not _is_scale(name) and not _is_part(name, prefix)]
    unusable = (*_missing(known, infos, family), *_state(infos))
    problems = [*unusable]
    if extra:
        problems.append(f"{len(extra)} unknown tensors: {first_few(sorted(extra))}")
    return Identity(family, "dit", variant, style, prefix, tuple(problems), _notes(family, variant, infos), sizes, unusable=unusable)


def parts_of(names: Iterable[str], prefix: str) -> dict[str, str]:
    """The other models in a transformer's file: role -> prefix of their keys."""
    found: dict[str, str] = {}
    for name in names:
        bare = name.removeprefix(prefix)
        start = bare[: bare.find(".") + 1]
        if start in PART_ROLES:
            found[PART_ROLES[start]] = name[: len(name) - len(bare)] + start
    return found


def is_bfl_key(key: str) -> bool:
    """Is this a key of a FLUX or Chroma transformer in BFL names?"""
    return TABLE.recipe(key) is not None


def canonical_shapes(recipes: dict[str, Recipe], infos: Infos) -> Infos:
    """Shapes under BFL names; tensors with missing parts are left out."""
    made: dict[str, TensorInfo] = {}
    for key, recipe in recipes.items():
        parts = [infos[name] for name in recipe.keys if name in infos]
        if len(parts) == len(recipe.keys) and parts[0].shape:
            shape = (sum(part.shape[0] for part in parts if part.shape), *parts[0].shape[1:])
            made[key] = parts[0]._replace(shape=shape)
    return made


def dit_sizes(shapes: Infos) -> dict[str, Any]:
    """Sizes read from BFL-named shapes; absent ones are left out."""
    doubles, singles = indices(shapes, "double_blocks."), indices(shapes, "single_blocks.")
    head = side(shapes, "single_blocks.0.norm.query_norm.scale", 0) or side(shapes, "double_blocks.0.img_attn.norm.query_norm.scale", 0)
    sizes = {
        "in_channels": side(shapes, "img_in.weight", 1),
        "hidden": side(shapes, "img_in.weight", 0),
        "out_channels": side(shapes, "final_layer.linear.weight", 0),
        "text_width": side(shapes, "txt_in.weight", 1),
        "pooled_width": side(shapes, "vector_in.in_layer.weight", 1),
        "head": head,
        "double_blocks": 1 + doubles[-1] if doubles else 0,
        "single_blocks": 1 + singles[-1] if singles else 0,
        "guidance": "guidance_in.in_layer.weight" in shapes,
    }
    return {name: value for name, value in sizes.items() if value is not None}


def _member(shapes: Infos, names: set[str]) -> tuple[str, str]:
    if any(key.startswith("distilled_guidance_layer.") for key in shapes):
        return "chroma", "chroma"
    for family, parts in EXTRA_PARTS.items():
        if any(name.startswith(parts) for name in names):
            edits = family == "step1x" or any(name.startswith("embedding_merger.") for name in names)
            return family, "edit" if edits else "generation"
    channels = side(shapes, "img_in.weight", 1)
    if channels == FLEX2_CHANNELS:
        return "flex", "preview"
    special = IN_CHANNELS.get(channels or 64, "custom")
    return "flux1", special or ("dev" if "guidance_in.in_layer.weight" in shapes else "schnell")


def _notes(family: str, variant: str, infos: Infos) -> tuple[str, ...]:
    notes = []
    if (family, variant) == ("flux1", "dev"):
        notes.append("dev, Krea and Kontext have one structure: choose the preset")
    if (family, variant) == ("flux1", "canny-depth"):
        notes.append("Canny and Depth have one structure: choose the preset")
    if variant == "custom":
        notes.append("an unusual number of input channels")
    if any(info.dtype.startswith("F8_") for info in infos.values()):
        notes.append("weights are stored in 8 bits")
    return tuple(notes)


def _is_scale(name: str) -> bool:
    return bool(SCALES.search(name))


def _is_part(name: str, prefix: str) -> bool:
    parts = tuple(part for group in EXTRA_PARTS.values() for part in group)
    return name.startswith(parts) or name.removeprefix(prefix).startswith(parts)


def _state(infos: Infos) -> tuple[str, ...]:
    """Stored forms that cannot be read as plain weights."""
    scales = [name for name in infos if _is_scale(name)]
    if scales:
        return (f"weights are scaled 8-bit ({len(scales)} scale tensors, e.g. {scales[0]}): get the bf16 or plain fp8 file",)
    quantised = [name for name in infos if QUANTISED.search(name)]
    if quantised:
        return (f"weights are quantised ({len(quantised)} state tensors, e.g. {quantised[0]}): get the bf16 file",)
    integers = [name for name, info in infos.items() if info.dtype in ("I8", "U8", "I32") and len(info.shape) > 1]
    return (f"{len(integers)} weights are integers without scales, e.g. {integers[0]}: get the bf16 file",) if integers else ()


def _missing(known: dict[str, Recipe], infos: Infos, family: str) -> tuple[str, ...]:
    """Block gaps, absent keys, and recipes with absent parts."""
    problems = []
    for stack in ("double_blocks.", "single_blocks."):
        found = indices(known.keys(), stack)
        gaps = sorted(set(range(found[-1] + 1 if found else 1)) - set(found))
        if gaps:
            problems.append(f"{stack}* has no block {first_few([str(gap) for gap in gaps])}")
    absent = [key for key in expected_keys(known, family) if key not in known]
    absent += [name for recipe in known.values() for name in recipe.keys if name not in infos]
    if absent:
        problems.append(f"{len(absent)} tensors are missing: {first_few(absent)}")
    return tuple(problems)


def expected_keys(known: Iterable[str], family: str) -> list[str]:
    """All keys that a transformer with these blocks must have."""
    known = set(known)
    leaves = ("weight", "bias")
    keys = [f"{layer}.{leaf}" for layer in _outer(known, family) for leaf in leaves]
    for stack, layers, norms in (
        ("double_blocks.", TABLE.double_layers, TABLE.double_norms),
        ("single_blocks.", TABLE.single_layers, TABLE.single_norms),
    ):
        present = indices(known, stack)
        wanted = [layer for layer in layers if family != "chroma" or "mod" not in layer]
        biased = {layer: f"{stack}{present[0]}.{layer}.bias" in known for layer in wanted} if present else {}
        for index in present:
            keys += [f"{stack}{index}.{layer}.weight" for layer in wanted]
            keys += [f"{stack}{index}.{layer}.bias" for layer in wanted if biased[layer] or not layer.endswith("qkv")]
            keys += [f"{stack}{index}.{norm}" for norm in norms]
    return keys


def _outer(known: set[str], family: str) -> list[str]:
    chroma = ["img_in", "txt_in", "final_layer.linear"]
    if family == "chroma":
        return [*chroma, "distilled_guidance_layer.in_proj", "distilled_guidance_layer.out_proj"]
    guided = any(key.startswith("guidance_in.") for key in known)
    return [layer for layer in TABLE.outer_layers if guided or not layer.startswith("guidance_in.")]


def layer_map(style: str) -> LayerMap:
    """The table of a naming (not for bfl)."""
    return MAPS[style]
