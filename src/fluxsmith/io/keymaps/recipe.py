"""How one tensor in the checkpoint's own (BFL) names is made from tensors in another naming: data, no torch.

`source_of("double_blocks.0.img_attn.qkv.weight", "diffusers").keys` names the three tensors to stack.
A `LayerMap` is the table of one naming; adapters use its layer names, loaders its keys.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Op = Literal["copy", "concat", "swap_halves", "conv1x1"]
LEAVES = ("weight", "bias")
INDEXED = re.compile(r"^(?P<stack>.*?\.)(?P<index>\d+)\.(?P<rest>.+)$")


class Recipe(NamedTuple):
    """The stored tensors, and what to do with them.

    copy: as it is. concat: stack rows in order. swap_halves: second half of the rows first. conv1x1: (o, i) -> (o, i, 1, 1).
    """

    keys: tuple[str, ...]
    op: Op = "copy"


class Place(NamedTuple):
    """Where a foreign layer or key sits: part `part` of `parts` of the BFL name."""

    name: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class LayerMap:
    """One foreign naming. Layers have no `.weight`; `norms` are whole keys. Block tables lack the block prefix."""

    double_prefix: str
    single_prefix: str
    double_layers: dict[str, tuple[str, ...]]
    single_layers: dict[str, tuple[str, ...]]
    outer_layers: dict[str, tuple[str, ...]]
    double_norms: dict[str, str]
    single_norms: dict[str, str]
    swapped: frozenset[str] = frozenset()  # BFL layers whose foreign rows come in the other half order
    outer_keys: dict[str, str] = field(default_factory=dict)  # BFL key pattern -> foreign pattern, `*` is a number

    def layer(self, bfl: str) -> tuple[str, ...] | None:
        """Foreign layers of a BFL layer path, in row order; None if this naming has no such layer."""
        for ours, theirs, table in self._stacks():
            if bfl.startswith(ours):
                index, _, rest = bfl[len(ours) :].partition(".")
                found = table.get(rest)
                return None if found is None or not index.isdigit() else tuple(f"{theirs}{index}.{name}" for name in found)
        return self.outer_layers.get(bfl)

    def bfl_layer(self, foreign: str) -> Place | None:
        """The BFL layer that a foreign layer is (a part of)."""
        for ours, theirs, table in self._stacks():
            if foreign.startswith(theirs):
                index, _, rest = foreign[len(theirs) :].partition(".")
                place = _find(table, rest)
                return place._replace(name=f"{ours}{index}.{place.name}") if place and index.isdigit() else None
        return _find(self.outer_layers, foreign)

    def recipe(self, bfl_key: str) -> Recipe | None:
        """How to make a BFL key; None if this naming has no such key."""
        layer, _, leaf = bfl_key.rpartition(".")
        if leaf in LEAVES:
            layers = self.layer(layer)
            if layers is not None:
                op: Op = "concat" if len(layers) > 1 else "swap_halves" if layer in self.swapped else "copy"
                return Recipe(tuple(f"{name}.{leaf}" for name in layers), op)
        key = self._norm(bfl_key)
        return Recipe((key,)) if key else None

    def bfl_key(self, foreign: str) -> Place | None:
        """The BFL key that a foreign key is (a part of)."""
        layer, _, leaf = foreign.rpartition(".")
        if leaf in LEAVES:
            place = self.bfl_layer(layer)
            if place is not None:
                return place._replace(name=f"{place.name}.{leaf}")
        return self._bfl_norm(foreign)

    def recipes(self, names: Iterable[str]) -> dict[str, Recipe]:
        """All BFL keys that the given foreign keys make, in BFL order of first sight; unknown names are left out."""
        made: dict[str, Recipe] = {}
        for name in names:
            place = self.bfl_key(name)
            recipe = self.recipe(place.name) if place else None
            if place and recipe:
                made[place.name] = recipe
        return made

    def _stacks(self) -> tuple[tuple[str, str, dict[str, tuple[str, ...]]], ...]:
        return (
            ("double_blocks.", self.double_prefix, self.double_layers),
            ("single_blocks.", self.single_prefix, self.single_layers),
        )

    def _norm_stacks(self) -> tuple[tuple[str, str, dict[str, str]], ...]:
        return (("double_blocks.", self.double_prefix, self.double_norms), ("single_blocks.", self.single_prefix, self.single_norms))

    def _norm(self, bfl_key: str) -> str | None:
        for ours, theirs, table in self._norm_stacks():
            if bfl_key.startswith(ours):
                index, _, rest = bfl_key[len(ours) :].partition(".")
                return f"{theirs}{index}.{table[rest]}" if rest in table else None
        return _through(self.outer_keys, bfl_key)

    def _bfl_norm(self, foreign: str) -> Place | None:
        for ours, theirs, table in self._norm_stacks():
            if foreign.startswith(theirs):
                index, _, rest = foreign[len(theirs) :].partition(".")
                found = next((name for name, other in table.items() if other == rest), None)
                return Place(f"{ours}{index}.{found}") if found else None
        found = _through({theirs: ours for ours, theirs in self.outer_keys.items()}, foreign)
        return Place(found) if found else None


def _find(table: dict[str, tuple[str, ...]], foreign: str) -> Place | None:
    for ours, names in table.items():
        if foreign in names:
            return Place(ours, names.index(foreign), len(names))
    return None


def _through(patterns: dict[str, str], key: str) -> str | None:
    """Rename by patterns in which `*` is one number."""
    for source, target in patterns.items():
        found = re.fullmatch(re.escape(source).replace(r"\*", r"(\d+)"), key)
        if found:
            return target.replace("*", found[1]) if found.groups() else target
    return None
