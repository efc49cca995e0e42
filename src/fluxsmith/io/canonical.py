"""One table of tensors in the names our models use, whatever naming the file has: what loaders read from.

`canonical(weights, require_role(path, "dit"), "dit")["img_in.weight"].read()`; nothing is read before `read` is called.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from fluxsmith.io.gguf_header import QUANTISED
from fluxsmith.io.identify import Identity
from fluxsmith.io.identify_dit import is_bfl_key
from fluxsmith.io.keymaps import Recipe, bfl_keys, comfy, diffusers
from fluxsmith.io.keymaps.apply import assemble, assembled_shape
from fluxsmith.io.safetensors import WeightsFile
from fluxsmith.io.scaled import ScaledFile


class Source(NamedTuple):
    """A tensor that can be read: its shape, and how. `stored` reads the parts of one that is stored in fewer bits, as they are."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    stored: Callable[[], Mapping[str, Tensor]] | None = None
    form: str = ""


def canonical(weights: WeightsFile, identity: Identity, role: str) -> dict[str, Source]:
    """BFL keys of a dit or ae, `text_model.*` of clip_l, T5 keys with `shared.weight` of t5xxl -> Source.

    Of other roles the published file's own names without prefixes (docs/reference/model-files.md). Tensors that the role does
    not know (position_ids, other models in a checkpoint) are left out. Raises ModelFileError for fused layers with a missing part.
    """
    where = str(weights.paths[0])
    made = recipes_of(weights, identity, role)
    return {
        key: Source(assembled_shape(recipe, weights.infos, where=where), _reader(weights, recipe), *_parts(weights, recipe))
        for key, recipe in made.items()
    }


def recipes_of(weights: WeightsFile, identity: Identity, role: str) -> dict[str, Recipe]:
    """Canonical key -> how it is made of the stored tensors, with their full names."""
    prefix = (identity.parts() | identity.roles()).get(role, identity.prefix)
    names = [name[len(prefix) :] for name in weights if name.startswith(prefix)]
    rule = RULES.get(role)
    recipes = rule(names, identity.key_style) if rule else {name: Recipe((name,)) for name in names}
    return {key: Recipe(tuple(prefix + name for name in recipe.keys), recipe.op) for key, recipe in recipes.items()}


def _dit(names: list[str], style: str) -> dict[str, Recipe]:
    return {key: recipe for key, recipe in bfl_keys(names, style).items() if is_bfl_key(key)}


def _controlnet(names: list[str], style: str) -> dict[str, Recipe]:
    return bfl_keys(names, style) | {name: Recipe((name,)) for name in names if name.startswith("controlnet_")}


def _clip(names: list[str], style: str) -> dict[str, Recipe]:
    return comfy.clip_recipes(names)


def _t5(names: list[str], style: str) -> dict[str, Recipe]:
    return comfy.t5_recipes(names)


def _ae(names: list[str], style: str) -> dict[str, Recipe]:
    if any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in names):
        return diffusers.ae_recipes(names)
    return {name: Recipe((name,), "conv1x1" if diffusers.AE_ATTENTION.fullmatch(name) else "copy") for name in names}


def _ip_adapter(names: list[str], style: str) -> dict[str, Recipe]:
    """`image_proj.*` and `ip_adapter.N.*`, or XLabs' own names."""
    return {name.replace("ipadapter_modules.", "ip_adapter.", 1) if style == "diffsynth" else name: Recipe((name,)) for name in names}


def _image_encoder(names: list[str], style: str) -> dict[str, Recipe]:
    """`vision_model.*` and, of CLIP, `visual_projection.weight`; the text half and position numbers are left out."""
    if style == "hf without vision_model":
        named = {name if name.startswith("visual_projection.") else f"vision_model.{name}": name for name in names}
    else:
        named = {name: name for name in names if name.startswith(("vision_model.", "visual_projection."))}
    return {key: Recipe((name,)) for key, name in named.items() if not key.endswith(".position_ids")}


def _language_model(names: list[str], style: str) -> dict[str, Recipe]:
    """`visual.*`, `model.*`, `lm_head.weight` as in the published files, also from transformers 5's layout."""
    if style != "hf5":
        return {name: Recipe((name,)) for name in names}
    return {name.replace("model.visual.", "visual.", 1).replace("model.language_model.", "model.", 1): Recipe((name,)) for name in names}


RULES: dict[str, Callable[[list[str], str], dict[str, Recipe]]] = {
    "dit": _dit,
    "controlnet": _controlnet,
    "clip_l": _clip,
    "t5xxl": _t5,
    "ae": _ae,
    "ip_adapter": _ip_adapter,
    "image_encoder": _image_encoder,
    "language_model": _language_model,
}


def _parts(weights: WeightsFile, recipe: Recipe) -> tuple[Callable[[], Mapping[str, Tensor]] | None, str]:
    name = recipe.keys[0]
    if (
        not isinstance(weights, ScaledFile)
        or name not in weights.scaled
        or weights.scaled[name].form in QUANTISED
        or recipe != Recipe((name,))
    ):
        return None, ""
    stored = weights.scaled[name]
    kind = weights.stored[stored.parts[""]].dtype
    return lambda: weights.parts(name), {"I8": "int8", "F8_E4M3": "fp8"}.get(kind, "") if stored.form == "scaled" else stored.form


def _reader(weights: WeightsFile, recipe: Recipe) -> Callable[[], Tensor]:
    def read() -> Tensor:
        return assemble(recipe, weights.tensor)

    return read
