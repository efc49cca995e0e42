"""What the formats share when reading: tensors grouped by layer name, then put together per layer with every check.

A format only says which layer a name means; kinds, sizes, missing factors and fused parts are settled here.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from fluxsmith.adapters.formats.fused import swapped, unsplit
from fluxsmith.adapters.formats.kinds import KINDS, Sizes, sizes
from fluxsmith.adapters.formats.state import LayerState, Part
from fluxsmith.adapters.formats.suffixes import split
from fluxsmith.adapters.targets import parts_of
from fluxsmith.errors import ModelFileError
from fluxsmith.io.keymaps import LayerMap, Place


class Entry(NamedTuple):
    """The tensors stored under one name, where they belong, and their alpha (None: none is stored)."""

    name: str
    place: Place
    kind: str
    tensors: dict[str, Tensor]
    alpha: float | None
    sizes: Sizes
    rule: str = ""

    @property
    def rank(self) -> int:
        """Width of the factors; 0 for kinds without one."""
        return Part("", 0, 0, self.kind, self.tensors, 1.0).rank


class Group(NamedTuple):
    """All tensors of one name, as `{kind: {tensor: value}}`; kind "" holds those that several kinds have."""

    name: str
    kinds: dict[str, dict[str, Tensor]]
    rule: str


def grouped(tensors: Mapping[str, Tensor]) -> dict[str, Group]:
    """Name -> its tensors. Raises ModelFileError for keys that are no part of an adapter."""
    groups: dict[str, Group] = {}
    unknown = []
    for key, tensor in tensors.items():
        ending = split(key)
        if ending is None:
            unknown.append(key)
            continue
        group = groups.setdefault(ending.name, Group(ending.name, {}, ""))
        if ending.tensor == "magnitude":
            groups[ending.name] = group = group._replace(rule="peft" if "lora_magnitude_vector" in key else "lycoris")
        group.kinds.setdefault(ending.kind, {})[ending.tensor] = tensor
    unknown += [f"{group.name}.weight" for group in groups.values() if set(group.kinds.get("ia3", {})) == {"weight"}]
    if unknown:
        raise ModelFileError(f"{len(unknown)} tensors are no part of a LoRA or the like, e.g. {unknown[0]}")
    return groups


def entries(group: Group, place: Place | None) -> list[Entry]:
    """The checked adapters under one name: one, or several where one name holds rotations for q, k and v.

    Raises ModelFileError that names the layer.
    """
    if place is None:
        raise ModelFileError(f"no FLUX layer is called {group.name}", fix="check that the adapter is for FLUX.1")
    shared = dict(group.kinds.get("", {}))
    kinds = [kind for kind in group.kinds if kind]
    if "convolution" in shared:
        raise ModelFileError(f"{group.name} has factors of a convolution, and FLUX has none", fix="check that the adapter is for FLUX.1")
    if len(kinds) != 1:
        what = f"mixes {' and '.join(kinds)}" if kinds else "has no factors"
        raise ModelFileError(f"{group.name} {what}", fix="get a complete file")
    alpha = _number(group.name, "alpha", shared.pop("alpha", None))
    scalar = _number(group.name, "scalar", shared.pop("scalar", None))
    own = group.kinds[kinds[0]]
    if kinds[0] == "oft":
        return _rotations(group.name, place, own, alpha)
    kind = _kind(kinds[0], own)
    made = Entry(group.name, place, kind, _shaped(own | shared), alpha, Sizes(None, None), group.rule)
    made = made._replace(sizes=sizes(kind, group.name, made.tensors))
    if scalar not in (None, 1.0):
        if not made.rank:
            raise ModelFileError(f"{group.name} has a scalar that nothing defines for {kind}")
        made = made._replace(alpha=(made.rank if alpha is None else alpha) * scalar)
    return [made]


def _number(name: str, what: str, tensor: Tensor | None) -> float | None:
    if tensor is not None and tensor.numel() != 1:
        raise ModelFileError(f"the {what} of {name} is not one number")
    return None if tensor is None else float(tensor.item())


def _kind(kind: str, tensors: Mapping[str, Tensor]) -> str:
    if kind != "oft_blocks":
        return kind
    return "boft" if tensors["blocks"].dim() == KINDS["boft"].axes else "diag_oft"


def _shaped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Magnitudes as (rows, 1) or (1, in)."""
    magnitude = tensors.get("magnitude")
    return tensors | {"magnitude": magnitude[:, None]} if magnitude is not None and magnitude.dim() == 1 else tensors


def _rotations(name: str, place: Place, blocks: Mapping[str, Tensor], alpha: float | None) -> list[Entry]:
    """sd-scripts' OFT: numbered block sets, one for each part of a fused layer."""
    count = len(blocks)
    if sorted(blocks, key=int) != [str(number) for number in range(count)]:
        raise ModelFileError(f"{name} has blocks {', '.join(sorted(blocks, key=int))}, some are missing", fix="get a complete file")
    if count not in (1, len(parts_of(place.name))):
        raise ModelFileError(f"{name} has {count} sets of blocks, {len(parts_of(place.name)) or 1} were expected")
    made = []
    for number in range(count):
        own = {"blocks": blocks[str(number)]}
        where = place._replace(part=number, parts=count) if count > 1 else place
        made.append(Entry(name, where, "oft", own, 0.001 if alpha is None else alpha, sizes("oft", name, own)))
    return made


def in_bfl_order(item: Entry, table: LayerMap, prefix: str = "dit.") -> Entry:
    """An entry of a naming that stores some layers' halves the other way round (`norm_out.linear`): its rows are swapped."""
    if item.place.name.removeprefix(prefix) not in table.swapped:
        return item
    part = swapped(_part(item, "", 0), item.name)
    return item._replace(tensors=dict(part.tensors))


def layers_from(items: Iterable[Entry]) -> dict[str, LayerState]:
    """Entries -> layers: parts of fused layers are put in their rows, and made whole again where that loses nothing."""
    members: dict[str, list[Entry]] = {}
    for item in items:
        members.setdefault(item.place.name, []).append(item)
    return {path: _layer(path, own) for path, own in members.items()}


def _layer(path: str, items: list[Entry]) -> LayerState:
    names = parts_of(path)
    places = [item.place for item in items]
    if len({place.part for place in places}) < len(items) or (len(items) > 1 and any(place.parts == 1 for place in places)):
        raise ModelFileError(f"{path} is in the file twice")
    inputs = {item.sizes.in_features for item in items} - {None}
    if len(inputs) > 1:
        raise ModelFileError(f"the parts of {path} do not fit together", why=f"they have {sorted(map(str, inputs))} inputs")
    in_features = inputs.pop() if inputs else None
    parts = []
    for item in items:
        if item.place.parts == 1:
            parts.append(_part(item, "", 0))
        else:
            parts.append(_part(item, names[item.place.part], item.place.part * _width(path, items, in_features)))
    parts.sort(key=lambda part: part.start)
    return unsplit(LayerState(tuple(parts), _height(path, parts, items, in_features), in_features), names)


def _part(item: Entry, name: str, start: int) -> Part:
    rows = item.sizes.rows if item.sizes.rows is not None else 0  # (IA)3 on inputs and the like: settled with the base model
    alpha = float(item.rank or 1) if item.alpha is None else item.alpha
    return Part(name, start, start + rows, item.kind, item.tensors, alpha, item.rule)


def _width(path: str, items: list[Entry], in_features: int | None) -> int:
    """The model's width, which q, k and v have as rows."""
    known = [item.sizes.rows for item in items if item.place.part < 3 and item.sizes.rows]
    if in_features is None and not known:
        raise ModelFileError(f"where the parts of {path} belong cannot be told from this file")
    return in_features if in_features is not None else known[0] or 0


def _height(path: str, parts: list[Part], items: list[Entry], in_features: int | None) -> int | None:
    names = parts_of(path)
    if any(item.sizes.rows is None for item in items):
        return None
    if not parts[0].name or any(part.name == names[-1] for part in parts):
        return max(part.stop for part in parts)
    return 3 * _width(path, items, in_features) if len(names) == 3 else None  # the MLP's rows are not told
