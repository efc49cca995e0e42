"""Insert-Anything: a thing from one picture put into another. Fill repaints the right half of a pair, with the thing on the left.

`pair_of(call)` makes the pair, its mask and what Redux looks at; `Pair.pasted(drawn)` brings the result back into the whole picture.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from PIL import Image, ImageFilter

from fluxsmith.dialects.diffsynth.call import Call
from fluxsmith.errors import ConfigError, Problem

SIDE = 768  # pixels of each half
MIDDLE = 128  # grey value above which a mask counts
GROWTH = 13  # pixels of the square that the place's mask grows by
AROUND = 1.3  # the thing's half is so much larger than the thing
LEAST, FULL = 0.1, 0.6  # part of the picture a cut has at least; a place of that part is cut as the whole picture
INSET = 2  # pixels of the cut's border that stay as they were
WHITE = (255, 255, 255)
NAMES = ("source_image", "source_mask", "ref_image", "ref_mask")


class Box(NamedTuple):
    """Pixels from left and top to right and bottom, the last ones not included."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.right - self.left, self.bottom - self.top

    def scaled(self, factor: float, whole: tuple[int, int]) -> "Box":
        """Larger around its centre, as far as the picture goes."""
        half = [side * factor / 2 for side in self.size]
        middle = (self.left + self.right) / 2, (self.top + self.bottom) / 2
        low = [max(0, int(m - h)) for m, h in zip(middle, half, strict=True)]
        high = [min(end, int(m + h)) for m, h, end in zip(middle, half, whole, strict=True)]
        return Box(low[0], low[1], high[0], high[1])

    def widened(self, whole: tuple[int, int]) -> "Box":
        """Grown until its part of the picture is what a place of its size is cut with."""
        part = self.size[0] * self.size[1] / (whole[0] * whole[1])
        wanted = LEAST + (1 - LEAST) / FULL * part if part < FULL else 1.0
        return self.scaled((wanted / part) ** 0.5, whole)

    def squared(self, whole: tuple[int, int]) -> "Box":
        """A square of its longer side around its centre, as far as the picture goes."""
        side = max(self.size)
        left, top = (self.left + self.right - side) // 2, (self.top + self.bottom - side) // 2
        return Box(max(0, left), max(0, top), min(whole[0], left + side), min(whole[1], top + side))


@dataclass(frozen=True)
class Pair:
    """What is drawn, and where it belongs."""

    call: Call
    """With the pair and its mask for Fill and the thing for Redux."""
    source: Image.Image
    cut: Box

    def pasted(self, drawn: Image.Image) -> Image.Image:
        """The source with the right half of the drawn pair in its place."""
        half = drawn.crop((drawn.width // 2, 0, drawn.width, drawn.height))
        side, (width, height) = max(self.cut.size), self.cut.size
        left, top = (side - width) // 2, (side - height) // 2
        own = half.resize((side, side)).crop((left, top, left + width, top + height))
        whole = self.source.copy()
        whole.paste(own.crop((INSET, INSET, width - INSET, height - INSET)), (self.cut.left + INSET, self.cut.top + INSET))
        return whole


def problems(call: Call) -> Iterator[Problem]:
    """All four pictures are needed, and masks of their picture's size."""
    given = {name: getattr(call, f"insert_anything_{name}") for name in NAMES}
    missing = [f"insert_anything_{name}" for name, value in given.items() if value is None]
    if missing and len(missing) < len(NAMES):
        yield Problem(f"{', '.join(missing)} is missing", why="insert_anything needs two pictures with a mask each", fix="pass it")
    for kind in ("source", "ref"):
        image, mask = given[f"{kind}_image"], given[f"{kind}_mask"]
        if not missing and image.size != mask.size:
            what = f"insert_anything_{kind}_mask has {mask.width} x {mask.height} pixels, its picture {image.width} x {image.height}"
            yield Problem(what, fix=f"insert_anything_{kind}_mask.resize({image.size})")


def pair_of(call: Call) -> Pair | None:
    """The call as Fill and Redux take it; None where nothing is inserted. Raises ConfigError for an empty mask."""
    if call.insert_anything_source_image is None:
        return None
    parts: Any = [getattr(call, f"insert_anything_{name}") for name in NAMES]
    source, place, reference, shape = parts
    thing = thing_of(reference.convert("RGB"), _marked(shape, "insert_anything_ref_mask"))
    source, place = source.convert("RGB"), _marked(place, "insert_anything_source_mask").filter(ImageFilter.MaxFilter(GROWTH))
    cut = _box(place).widened(source.size).widened(source.size).squared(source.size)
    pair, mask = Image.new("RGB", (2 * SIDE, SIDE)), Image.new("L", (2 * SIDE, SIDE))
    pair.paste(thing, (0, 0))
    pair.paste(_on_square(source.crop(cut), WHITE).resize((SIDE, SIDE)), (SIDE, 0))
    mask.paste(_on_square(place.crop(cut), 0).resize((SIDE, SIDE)), (SIDE, 0))
    asked = replace(call, flux_fill_image=pair, flux_fill_mask=mask, flux_redux_image=thing, width=2 * SIDE, height=SIDE)
    return Pair(asked, source, cut)


def thing_of(reference: Image.Image, shape: Image.Image) -> Image.Image:
    """The thing alone on white, with a margin, as a square."""
    alone = Image.composite(reference, Image.new("RGB", reference.size, WHITE), shape).crop(_box(shape))
    wide = Image.new("RGB", (int(alone.width * AROUND), int(alone.height * AROUND)), WHITE)
    wide.paste(alone, ((wide.width - alone.width) // 2, (wide.height - alone.height) // 2))
    return _on_square(wide, WHITE).resize((SIDE, SIDE))


def _marked(mask: Image.Image, name: str) -> Image.Image:
    made = mask.convert("L").point([255 * (value > MIDDLE) for value in range(256)])
    if made.getbbox() is None:
        raise ConfigError(f"{name} marks nothing", why="no pixel of it is white", fix="paint the place white")
    return made


def _box(mask: Image.Image) -> Box:
    return Box(*(mask.getbbox() or (0, 0, *mask.size)))


def _on_square(image: Image.Image, colour: Any) -> Image.Image:
    side = max(image.size)
    made = Image.new(image.mode, (side, side), colour)
    made.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return made
