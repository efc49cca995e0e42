"""One file per foreign key naming, as data, onto the checkpoint's own (BFL) names.

`bfl_keys(names, "diffusers")` says how every BFL tensor is made from the stored ones; `apply.assemble` makes it.
"""

from collections.abc import Iterable
from typing import Literal

from fluxsmith.io.keymaps import diffsynth, diffusers
from fluxsmith.io.keymaps.recipe import LayerMap, Op, Place, Recipe

__all__ = ["MAPS", "LayerMap", "Op", "Place", "Recipe", "Style", "bfl_keys", "source_of"]

Style = Literal["bfl", "diffusers", "diffsynth", "nexus_gen"]
MAPS: dict[str, LayerMap] = {
    "diffusers": diffusers.TRANSFORMER,
    "diffsynth": diffsynth.TRANSFORMER,
    "nexus_gen": diffsynth.NEXUS_GEN,
}


def source_of(bfl_key: str, style: str) -> Recipe:
    """How one BFL key of the transformer is made in a naming. Raises KeyError if it has no such key."""
    if style == "bfl":
        return Recipe((bfl_key,))
    recipe = MAPS[style].recipe(bfl_key)
    if recipe is None:
        raise KeyError(bfl_key)
    return recipe


def bfl_keys(names: Iterable[str], style: str, prefix: str = "") -> dict[str, Recipe]:
    """BFL key -> recipe for all transformer keys found; keys in the recipes carry `prefix`, names without it are left out."""
    bare = [name[len(prefix) :] for name in names if name.startswith(prefix)]
    recipes = {name: Recipe((name,)) for name in bare} if style == "bfl" else MAPS[style].recipes(bare)
    return {key: Recipe(tuple(prefix + name for name in recipe.keys), recipe.op) for key, recipe in recipes.items()}
