"""One table of tensors in the names our models use, whatever naming the file has: what loaders read from.

`canonical(weights, require_role(path, "dit"), "dit")["img_in.weight"].read()`; nothing is read before `read` is called.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

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

    Tensors that the role does not know (position_ids, other models in a checkpoint) are left out. Raises ModelFileError for
    fused layers with a missing part.
    """
    where = str(weights.paths[0])
    made = recipes_of(weights, identity, role)
    return {
        key: Source(assembled_shape(recipe, weights.infos, where=where), _reader(weights, recipe), *_parts(weights, recipe))
        for key, recipe in made.items()
    }


def recipes_of(weights: WeightsFile, identity: Identity, role: str) -> dict[str, Recipe]:
    """Canonical key -> how it is made of the stored tensors, with their full names."""
    prefix = identity.roles().get(role, identity.prefix)
    names = [name[len(prefix) :] for name in weights if name.startswith(prefix)]
    if role == "dit":
        recipes = bfl_keys(names, identity.key_style)
        recipes = {key: recipe for key, recipe in recipes.items() if is_bfl_key(key)}
    elif role == "controlnet":
        recipes = bfl_keys(names, identity.key_style) | {name: Recipe((name,)) for name in names if name.startswith("controlnet_")}
    elif role == "clip_l":
        recipes = comfy.clip_recipes(names)
    elif role == "t5xxl":
        recipes = comfy.t5_recipes(names)
    elif any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in names):
        recipes = diffusers.ae_recipes(names)
    else:
        recipes = {name: Recipe((name,), "conv1x1" if diffusers.AE_ATTENTION.fullmatch(name) else "copy") for name in names}
    return {key: Recipe(tuple(prefix + name for name in recipe.keys), recipe.op) for key, recipe in recipes.items()}


def _parts(weights: WeightsFile, recipe: Recipe) -> tuple[Callable[[], Mapping[str, Tensor]] | None, str]:
    name = recipe.keys[0]
    if not isinstance(weights, ScaledFile) or name not in weights.scaled or recipe != Recipe((name,)):
        return None, ""
    stored = weights.scaled[name]
    kind = weights.stored[stored.parts[""]].dtype
    return lambda: weights.parts(name), {"I8": "int8", "F8_E4M3": "fp8"}.get(kind, "") if stored.form == "scaled" else stored.form


def _reader(weights: WeightsFile, recipe: Recipe) -> Callable[[], Tensor]:
    def read() -> Tensor:
        return assemble(recipe, weights.tensor)

    return read
