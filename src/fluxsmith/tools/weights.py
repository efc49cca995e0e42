"""The weights of a file as figures: name, shape, mean and smallest absolute value. `weight_report("cats.safetensors")`."""

from collections.abc import Container, Iterator
from typing import NamedTuple

from fluxsmith.adapters.formats.suffixes import split
from fluxsmith.io.safetensors import open_weights
from fluxsmith.io.sources import resolve
from fluxsmith.tools.model_file import Given


class WeightFigures(NamedTuple):
    """One tensor. `mean` and `least` are of the absolute values; `least` tells a factor that was never trained (all zero)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    mean: float
    least: float
    largest: float


def weight_report(given: Given, *, shows_all: bool = False) -> Iterator[WeightFigures]:
    """Figures of the factors of an adapter, or of every tensor of any file, in the file's order. One tensor is in memory at a time."""
    with open_weights(resolve(given, "lora")) as weights:
        for name, info in weights.infos.items():
            if not shows_all and not _is_factor(name, weights.infos):
                continue
            values = weights.tensor(name).float().abs()
            figures = (float(values.mean()), float(values.min()), float(values.max())) if values.numel() else (0.0, 0.0, 0.0)
            yield WeightFigures(name, tuple(info.shape), info.dtype, *figures)


def _is_factor(name: str, names: Container[str]) -> bool:
    """A part of an adapter but its alpha; a bare `.weight` is one only beside (IA)3's marker."""
    ending = split(name)
    if ending is not None and ending.tensor == "weight":
        return f"{ending.name}.on_input" in names
    return ending is not None and ending.tensor != "alpha"
