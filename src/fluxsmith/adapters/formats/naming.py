"""How layers are called in files: sd-scripts' flat names, BFL's, diffusers' and DiffSynth's dotted ones, onto layer paths and back.

Names come from fixed tables, never from a model in memory. `place_of("lora_unet_single_blocks_3_linear1")` is
Place("dit.single_blocks.3.linear1").
"""

import re
from typing import NamedTuple

from fluxsmith.adapters.formats.fused import bounds_of, cut, fuse, swapped
from fluxsmith.adapters.formats.state import LayerState, Part
from fluxsmith.adapters.targets import CLIP_LAYERS, KOHYA_PREFIXES, T5_LAYERS, kohya_name, parts_of
from fluxsmith.errors import ModelFileError
from fluxsmith.io.keymaps import MAPS, LayerMap, Place

DIFFUSERS, DIFFSYNTH = MAPS["diffusers"], MAPS["diffsynth"]
BFL = LayerMap(  # BFL names onto themselves
    "double_blocks.", "single_blocks.",
    {name: (name,) for name in DIFFUSERS.double_layers}, {name: (name,) for name in DIFFUSERS.single_layers},
    {name: (name,) for name in DIFFUSERS.outer_layers}, {}, {},
)  # fmt: skip
CLIP_NAME = re.compile(r"(?:lora|lycoris|oft)_te1_(?:text_model_)?encoder_layers_(\d+)_(.+)")
T5_NAME = re.compile(r"(?:lora|lycoris|oft)_te[23]_encoder_block_(\d+)_(.+)")
FLAT_PREFIXES = (
    ("lora_unet_", (BFL,)),
    ("oft_unet_", (BFL,)),
    ("lora_transformer_", (DIFFUSERS,)),
    ("lycoris_", (DIFFUSERS, BFL)),
)
DIT_PREFIXES = ("base_model.model.transformer.", "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "")
TEXT_PREFIXES = {
    "text_encoders.clip_l.transformer.": "clip_l.",
    "text_encoders.t5xxl.transformer.": "t5xxl.",
    "text_encoder.": "clip_l.",
    "text_encoder_2.": "t5xxl.",
}


class Found(NamedTuple):
    """Where a name belongs, and in which naming."""

    place: Place
    table: LayerMap | None


def flat(name: str) -> str:
    """Dots as underscores."""
    return name.replace(".", "_")


def dotted(table: LayerMap, name: str) -> str | None:
    """The dotted layer name of a table that an underscored one stands for."""
    for prefix, layers in ((table.double_prefix, table.double_layers), (table.single_prefix, table.single_layers)):
        found = re.fullmatch(re.escape(flat(prefix)) + r"(\d+)_(.+)", name)
        if found:
            leaf = next((other for names in layers.values() for other in names if flat(other) == found[2]), None)
            return f"{prefix}{found[1]}.{leaf}" if leaf else None
    return next((other for names in table.outer_layers.values() for other in names if flat(other) == name), None)


def find_flat(name: str) -> Found | None:
    """`lora_unet_...`, `lora_te1_...`, `lora_te3_...`, `lora_transformer_...`, `lycoris_...` -> the layer (part) it means."""
    for pattern, stem, leaves in (
        (CLIP_NAME, "clip_l.text_model.encoder.layers", CLIP_LAYERS),
        (T5_NAME, "t5xxl.encoder.block", T5_LAYERS),
    ):
        found = pattern.fullmatch(name)
        if found:
            leaf = next((leaf for leaf in leaves if flat(leaf) == found[2]), None)
            return Found(Place(f"{stem}.{found[1]}.{leaf}"), None) if leaf else None
    for prefix, tables in FLAT_PREFIXES:
        if name.startswith(prefix):
            for table in tables:
                layer = dotted(table, name.removeprefix(prefix))
                place = table.bfl_layer(layer) if layer else None
                if place:
                    return Found(place._replace(name=f"dit.{place.name}"), table)
    return None


def place_of(name: str) -> Place | None:
    """As `find_flat`, the place alone."""
    found = find_flat(name)
    return found.place if found else None


def find(name: str) -> Found | None:
    """The layer (part) that a dotted name means, with or without a prefix."""
    for prefix, role in TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return Found(Place(role + name.removeprefix(prefix)), None)
    for prefix in DIT_PREFIXES:
        if name.startswith(prefix):
            for table in (BFL, DIFFUSERS, DIFFSYNTH):
                place = table.bfl_layer(name.removeprefix(prefix))
                if place is not None:
                    return Found(place._replace(name=f"dit.{place.name}"), table)
    return None


def flat_name(path: str, prefix: str = "lora") -> str:
    """A layer path in sd-scripts' naming. Raises ModelFileError for a path of no known role."""
    if path.partition(".")[0] not in KOHYA_PREFIXES:
        raise ModelFileError(f"{path} has no name in sd-scripts' format")
    return kohya_name(path).replace("lora", prefix, 1)


def whole(path: str, layer: LayerState) -> Part:
    """The layer as one part, for namings that keep q, k and v together. Raises ModelFileError where that has no exact form."""
    return fuse(layer, path)


def in_diffusers(path: str, layer: LayerState) -> list[tuple[str, Part]]:
    """Layer names of diffusers (without the model's prefix) with their parts; what belongs to all rows of a fused layer is shared.

    Raises ModelFileError for layers that diffusers has no name for, and for kinds that cannot be cut.
    """
    role, _, rest = path.partition(".")
    if role != "dit":
        return [(rest, whole(path, layer))]
    names = DIFFUSERS.layer(rest)
    if names is None:
        raise ModelFileError(f"diffusers has no layer like {rest}", fix='write the file with format = "kohya"')
    if len(names) == 1:
        part = whole(path, layer)
        return [(names[0], swapped(part, path) if rest in DIFFUSERS.swapped else part)]
    parts = [own for part in layer.parts for own in (_cut(path, layer, part) if not part.name else [part])]
    return [(names[parts_of(path).index(part.name)], part) for part in parts]


def _cut(path: str, layer: LayerState, part: Part) -> list[Part]:
    if part.kind == "ia3" and bool(part.tensors["on_input"].item()):
        return [part.having(name=name) for name in parts_of(path)]  # the same inputs for q, k and v
    names = parts_of(path)
    width = layer.in_features or (part.rows // 3 if len(names) == 3 else None)
    if width is None:
        raise ModelFileError(f"where q, k and v of {path} end cannot be told from this file")
    return cut(part, names, bounds_of(names, part, width), path)
