"""What the LoRA formats share: tensors grouped by layer name, then put together per layer with every check.

A format only says which layer a name means; sizes, missing halves and fused parts are settled here.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from fluxsmith.adapters.formats.state import LayerState, Part, unsplit
from fluxsmith.adapters.targets import parts_of
from fluxsmith.errors import ModelFileError
from fluxsmith.io.keymaps import LayerMap, Place
from fluxsmith.io.keymaps.apply import swap_halves

SUFFIX = re.compile(r"\.(?:lora_(?P<half>A|B|down|up)(?:\.(?!weight$)[\w-]+)?\.weight|(?P<alpha>alpha))$")
HALVES = {"A": "down", "down": "down", "B": "up", "up": "up"}


class Pair(NamedTuple):
    """The factors stored under one name, where they belong, and their alpha (None: none is stored)."""

    name: str
    place: Place
    down: Tensor
    up: Tensor
    alpha: float | None


def split_name(key: str) -> tuple[str, str] | None:
    """`x.lora_A.default.weight` -> ("x", "down"); None if the key is no part of a LoRA."""
    found = SUFFIX.search(key)
    if found is None:
        return None
    return key[: found.start()], "alpha" if found["alpha"] else HALVES[found["half"]]


def grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Name -> its tensors (down, up, alpha). Raises ModelFileError for keys of another kind."""
    groups: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        named = split_name(key)
        if named is None:
            unknown.append(key)
        else:
            groups.setdefault(named[0], {})[named[1]] = tensor
    if unknown:
        raise ModelFileError(f"{len(unknown)} tensors are no part of a LoRA, e.g. {unknown[0]}")
    return groups


def pair(name: str, place: Place | None, tensors: Mapping[str, Tensor]) -> Pair:
    """One checked pair. Raises ModelFileError that names the layer."""
    if place is None:
        raise ModelFileError(f"no FLUX layer is called {name}", fix="check that the adapter is for FLUX.1")
    missing = [half for half in ("down", "up") if half not in tensors]
    if missing:
        raise ModelFileError(f"{name} has no {missing[0]} factor", fix="get a complete file")
    down, up = tensors["down"], tensors["up"]
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
        why = f"down {tuple(down.shape)}, up {tuple(up.shape)}"
        raise ModelFileError(f"the factors of {name} do not fit together", why=why, fix="get a complete file")
    alpha = tensors.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise ModelFileError(f"the alpha of {name} is not one number")
    return Pair(name, place, down, up, None if alpha is None else float(alpha.item()))


def in_bfl_order(item: Pair, table: LayerMap, prefix: str = "dit.") -> Pair:
    """A pair from a naming that stores some layers' halves the other way round (`norm_out.linear`): the up rows are swapped."""
    return item._replace(up=swap_halves(item.up)) if item.place.name.removeprefix(prefix) in table.swapped else item


def layers_from(pairs: Iterable[Pair]) -> dict[str, LayerState]:
    """Pairs -> layers: parts of fused layers are put in their rows, and made whole again where that loses nothing."""
    members: dict[str, list[Part]] = {}
    for item in pairs:
        names = parts_of(item.place.name)
        part = names[item.place.part] if item.place.parts > 1 else ""
        start = item.place.part * item.down.shape[1] if part else 0
        alpha = float(item.down.shape[0]) if item.alpha is None else item.alpha
        members.setdefault(item.place.name, []).append(Part(part, start, start + item.up.shape[0], item.down, item.up, alpha))
    return {path: _layer(path, parts) for path, parts in members.items()}


def _layer(path: str, parts: list[Part]) -> LayerState:
    if len({part.name for part in parts}) < len(parts) or (len(parts) > 1 and any(not part.name for part in parts)):
        raise ModelFileError(f"{path} is in the file twice")
    if len({part.down.shape[1] for part in parts}) > 1:
        raise ModelFileError(f"the parts of {path} do not fit together", why=str([tuple(part.down.shape) for part in parts]))
    ordered = tuple(sorted(parts, key=lambda part: part.start))
    return unsplit(LayerState(ordered, _height(path, parts)), parts_of(path))


def _height(path: str, parts: list[Part]) -> int | None:
    names = parts_of(path)
    if not parts[0].name or any(part.name == names[-1] for part in parts):
        return max(part.stop for part in parts)
    return 3 * parts[0].down.shape[1] if len(names) == 3 else None  # the MLP's rows are not told
