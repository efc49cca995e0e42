"""How a picture is drawn within a limit of device memory: which part works in which phase, and how many of its layers are streamed.

Pure: `within(parts, limit, ...)` takes sizes in bytes and gives counts and peaks. Formulas: docs/explanation/memory.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fluxsmith.memory.plan import CONTEXT, GIB
from fluxsmith.memory.sizes import evenly_spaced
from fluxsmith.memory.timeline import PIXEL

SLOTS = 2
STREAMS = 12  # tensors of all tokens (tokens x hidden) that a block holds while it computes without gradients
TEXT = GIB // 4  # activations of a text or picture encoder
CHANNELS = 128  # of the autoencoder's widest maps
TILED = 1536 * 1536  # pixels; larger pictures pass the autoencoder in tiles


@dataclass(frozen=True)
class Part:
    """A network in bytes: its layers in order, and the rest, which is resident while it works."""

    name: str
    phase: str
    layers: tuple[int, ...] = ()
    rest: int = 0

    @property
    def size(self) -> int:
        """All of it."""
        return sum(self.layers) + self.rest


class Drawing(NamedTuple):
    """What was chosen."""

    streamed: dict[str, int]
    """Part -> layers that wait on the host."""
    peaks: dict[str, int]
    """Phase -> device bytes, context included."""
    fits: bool

    @property
    def peak(self) -> int:
        """Of all phases."""
        return max(self.peaks.values(), default=0)


def activations(phase: str, *, tokens: int, hidden: int, pixels: int, width: int = 2) -> int:
    """Bytes on top of the weights while a phase computes; `width` is that of one value of the transformer."""
    if phase == "denoise":
        return STREAMS * tokens * hidden * width
    return PIXEL * CHANNELS * min(pixels, TILED) if phase == "decode" else TEXT


def resident(part: Part, streamed: int) -> int:
    """Device bytes of a part while it works with so many layers on the host."""
    if not streamed:
        return part.size
    gone = sum(part.layers[i] for i in evenly_spaced(streamed, len(part.layers)))
    return part.size - gone + max(part.layers) * min(SLOTS, streamed)


def within(parts: Sequence[Part], limit: float, *, tokens: int, hidden: int, pixels: int, width: int = 2) -> Drawing:
    """The fewest streamed layers that keep every phase within `limit` GiB; 0 streams all. `fits` is False where even that is too much.

    In a phase the part with the most layers is streamed first: it has the most computing to hide copies behind.
    """
    budget = int(limit * GIB) - CONTEXT
    streamed: dict[str, int] = {}
    peaks: dict[str, int] = {}
    for phase in dict.fromkeys(part.phase for part in parts):
        own = sorted((part for part in parts if part.phase == phase), key=lambda part: -sum(part.layers))
        left = budget - activations(phase, tokens=tokens, hidden=hidden, pixels=pixels, width=width)
        counts = _counts(own, left)
        streamed |= {name: count for name, count in counts.items() if count}
        peaks[phase] = budget - left + CONTEXT + sum(resident(part, counts[part.name]) for part in own)
    return Drawing(streamed, peaks, all(peak <= int(limit * GIB) for peak in peaks.values()))


def _counts(parts: Sequence[Part], budget: int) -> dict[str, int]:
    counts = dict.fromkeys((part.name for part in parts), 0)
    for part in parts:
        others = sum(resident(other, counts[other.name]) for other in parts if other is not part)
        if not part.layers or resident(part, 0) + others <= budget:
            continue
        able = (count for count in range(1, len(part.layers) + 1) if resident(part, count) + others <= budget)
        counts[part.name] = next(able, len(part.layers))
    return counts
