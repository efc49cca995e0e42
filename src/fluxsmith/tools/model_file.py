"""A model opened by a tool: single file, all-in-one checkpoint, shards or a diffusers folder, read tensor by tensor in canonical names.

`with model_file("flux1-dev.safetensors", "dit") as base: base.read("img_in.weight")`. Weights stored in 8 bits with scales are read
as what they stand for. Nothing is read before `read` is called.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fluxsmith.io.canonical import recipes_of
from fluxsmith.io.identify import check_role, identify
from fluxsmith.io.identity import Identity
from fluxsmith.io.keymaps.apply import assemble, assembled_shape
from fluxsmith.io.scaled import ScaledFile, open_scaled
from fluxsmith.io.sources import resolve

Given = str | os.PathLike[str]
ROLES = ("dit", "clip_l", "t5xxl")  # models that adapters are for
UNSCALED = torch.bfloat16  # type of a weight that was 8 bits with a scale, where a file keeps its types


class ModelFile:
    """One role of a file. `shapes` by canonical key: BFL names of the transformer, the usual names of the text encoders."""

    def __init__(self, weights: ScaledFile, identity: Identity, role: str) -> None:
        self.weights, self.identity, self.role = weights, identity, role
        self.path = weights.paths[0]
        self.recipes = recipes_of(weights, identity, role)
        self.shapes = {key: assembled_shape(recipe, weights.infos, where=str(self.path)) for key, recipe in self.recipes.items()}

    def read(self, key: str, *, device: torch.device | str = "cpu") -> Tensor:
        """One tensor as stored; fp32 for one that has a scale."""
        return assemble(self.recipes[key], lambda name: self.weights.tensor(name, device=device))

    def dtype(self, key: str) -> torch.dtype:
        """The type that a tensor is kept in."""
        return kept_dtype(self.weights, self.recipes[key].keys[0])

    def hidden(self) -> int:
        """The transformer's width, which tells where q, k, v end."""
        return int(self.identity.sizes.get("hidden", 0))

    def layers(self) -> list[str]:
        """Linear layers: names of two-axis weights without `.weight`, embedding tables of text encoders excepted."""
        return [
            key.removesuffix(".weight")
            for key, shape in self.shapes.items()
            if key.endswith(".weight") and len(shape) == 2 and not _is_table(key)
        ]


def _is_table(key: str) -> bool:
    return key == "shared.weight" or "embed" in key.rsplit(".", 2)[-2] or "relative_attention_bias" in key


def kept_dtype(weights: ScaledFile, name: str) -> torch.dtype:
    """The stored type of a tensor; bf16 for one that is 8 bits with a scale."""
    return UNSCALED if name in weights.scaled else weights.dtype(name)


@contextmanager
def model_file(given: Given, role: str) -> Iterator[ModelFile]:
    """Open a path, folder, hub id or bundled model for a role. Raises ModelFileError that names what it is instead."""
    path = resolve(given, role)
    with open_scaled(path) as weights:
        yield ModelFile(weights, check_role(identify(weights), role, where=str(path)), role)


def roles_in(path: Path) -> tuple[str, ...]:
    """Roles of ROLES that a file can play: several for an all-in-one checkpoint."""
    with open_scaled(path) as weights:
        return tuple(role for role in ROLES if role in identify(weights).roles())
