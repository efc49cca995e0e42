"""How each kind of adapter is stored: the tensors it needs and the sizes they tell. Data about files; the maths is in `adapters/<kind>.py`.

`sizes("lokr", tensors)` is Sizes(rows, in_features); None where the tensors do not tell.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from fluxsmith.errors import ModelFileError

Tensors = Mapping[str, Tensor]


class Sizes(NamedTuple):
    """Output rows and inputs of the layer that tensors are for; None: they do not tell."""

    rows: int | None
    in_features: int | None


class Kind(NamedTuple):
    """Sets of tensors of which one must be complete, how many axes they have, and how to read the sizes."""

    complete: tuple[tuple[str, ...], ...]
    axes: int
    sizes: Callable[[Tensors], Sizes]
    optional: tuple[str, ...] = ()


def _product(tensors: Tensors, left: str, right: str) -> tuple[int, int]:
    """Sides of `left @ right`. Raises ValueError if the inner sides differ."""
    a, b = tensors[left].shape, tensors[right].shape
    if a[1] != b[0]:
        raise ValueError(f"{left} {tuple(a)}, {right} {tuple(b)}")
    return a[0], b[1]


def _lora(tensors: Tensors) -> Sizes:
    return Sizes(*_product(tensors, "up", "down"))


def _lokr(tensors: Tensors) -> Sizes:
    sides = []
    for name in ("w1", "w2"):
        sides.append((tensors[name].shape[0], tensors[name].shape[1]) if name in tensors else _product(tensors, f"{name}_a", f"{name}_b"))
    return Sizes(sides[0][0] * sides[1][0], sides[0][1] * sides[1][1])


def _loha(tensors: Tensors) -> Sizes:
    first, second = _product(tensors, "w1_a", "w1_b"), _product(tensors, "w2_a", "w2_b")
    if first != second:
        raise ValueError(f"products are {first} and {second}")
    return Sizes(*first)


def _glora(tensors: Tensors) -> Sizes:
    square, (rows, columns) = _product(tensors, "a1", "a2"), _product(tensors, "b1", "b2")
    if square != (columns, columns):
        raise ValueError(f"products are {square} and {(rows, columns)}")
    return Sizes(rows, columns)


def _full(tensors: Tensors) -> Sizes:
    rows, columns = tensors["diff"].shape
    return Sizes(rows, columns)


def _ia3(tensors: Tensors) -> Sizes:
    count = tensors["weight"].shape[0]
    return Sizes(None, count) if bool(tensors["on_input"].item()) else Sizes(count, None)


def _rotation(tensors: Tensors) -> Sizes:
    *_, count, height, width = tensors["blocks"].shape
    if height != width:
        raise ValueError(f"blocks of {height} x {width}")
    return Sizes(count * height, None)


KINDS: Mapping[str, Kind] = {
    "lora": Kind((("down", "up"),), 2, _lora),
    "lokr": Kind(
        (("w1", "w2"), ("w1", "w2_a", "w2_b"), ("w1_a", "w1_b", "w2"), ("w1_a", "w1_b", "w2_a", "w2_b")), 2, _lokr
    ),
    "loha": Kind((("w1_a", "w1_b", "w2_a", "w2_b"),), 2, _loha),
    "glora": Kind((("a1", "a2", "b1", "b2"),), 2, _glora),
    "full": Kind((("diff",),), 2, _full),
    "ia3": Kind((("weight", "on_input"),), 1, _ia3),
    "oft": Kind((("blocks",),), 3, _rotation),
    "diag_oft": Kind((("blocks",),), 3, _rotation, ("rescale",)),
    "boft": Kind((("blocks",),), 4, _rotation, ("rescale",)),
}  # fmt: skip
ADDITIVE = ("lora", "lokr", "loha")  # kinds that add a matrix of their own, so that DoRA can go over them
ANY = ("bias", "magnitude")


def sizes(kind: str, name: str, tensors: Tensors) -> Sizes:
    """Sizes that the tensors of layer `name` tell. Raises ModelFileError if one is missing or they do not fit together."""
    info = KINDS[kind]
    own = {key for key in tensors if key not in (*ANY, *info.optional)}
    if not any(own == set(needed) for needed in info.complete):
        missing = next((key for needed in info.complete for key in needed if key not in own), "")
        what = f"{name} has no {missing} factor" if missing else f"{name} has tensors that do not belong together: {', '.join(sorted(own))}"
        raise ModelFileError(what, fix="get a complete file")
    if "magnitude" in tensors and kind not in ADDITIVE:
        raise ModelFileError(f"{name} has a magnitude (DoRA) over {kind}, which nothing defines")
    flat = [key for key in own if key != "on_input" and tensors[key].dim() != info.axes]
    try:
        if flat:
            raise ValueError(f"{flat[0]} {tuple(tensors[flat[0]].shape)}")
        return info.sizes(tensors)
    except ValueError as error:
        raise ModelFileError(f"the factors of {name} do not fit together", why=str(error), fix="get a complete file") from None
