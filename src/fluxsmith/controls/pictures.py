"""Pictures for controls: opened from a file or taken as they are, brought to a size, and turned into pixels in [-1, 1]."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fluxsmith.errors import DataError, Problem
from fluxsmith.io.images import probe_size, read_image


def opened(picture: Any) -> Image.Image:
    """An RGB picture from a path or a picture of Pillow. Raises DataError for a file that cannot be read."""
    return read_image(picture).image if isinstance(picture, str | Path) else picture.convert("RGB")


def cover(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scaled and cropped at its centre to a size (Lanczos); a picture of this size is left alone."""
    return image if image.size == (width, height) else ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def to_multiple(image: Image.Image, multiple: int = 16) -> Image.Image:
    """Scaled and cropped a little so that both sides are multiples, as the autoencoder and the patches need."""
    width, height = (max(multiple, side // multiple * multiple) for side in image.size)
    return cover(image, width, height)


def pixels(image: Image.Image) -> Tensor:
    """RGB picture -> (1, 3, H, W) in [-1, 1], fp32 on the host."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float().div(127.5).sub(1)


def stretch(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scaled to a size without cropping (Lanczos)."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def at_most(image: Image.Image, pixels: int | None) -> Image.Image:
    """Scaled down, with its shape, to so many pixels; None leaves it alone."""
    width, height = image.size
    if pixels is None or width * height <= pixels:
        return image
    factor = math.sqrt(pixels / (width * height))
    return image.resize((max(1, int(width * factor)), max(1, int(height * factor))), Image.Resampling.LANCZOS)


def alpha_of(picture: Any) -> Image.Image | None:
    """How opaque a picture is (mode L), or None where it has no transparency. Raises DataError for a file that cannot be read."""
    if isinstance(picture, str | Path):
        return read_image(picture).alpha
    return picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None


def size_of(picture: Any) -> tuple[int, int]:
    """Width and height, of a file from its header. Raises DataError for one that cannot be read."""
    return probe_size(picture) if isinstance(picture, str | Path) else picture.size


def unreadable(pictures: Iterable[Any]) -> Iterator[Problem]:
    """What keeps these pictures from being opened, told from the headers of their files; None is no picture."""
    for picture in pictures:
        try:
            if picture is not None:
                size_of(picture)
        except DataError as error:
            yield from error.problems


def grey(picture: Any) -> Image.Image:
    """A mask as a grey picture (mode L)."""
    return opened(picture).convert("L")


def shapes_differ(name: str, picture: Any, other_name: str, other: Any) -> Iterator[Problem]:
    """A problem if two pictures that lie over each other are not of one shape (their sizes may differ)."""
    (width, height), (other_width, other_height) = size_of(picture), size_of(other)
    if abs(width * other_height - height * other_width) > max(width, height, other_width, other_height):
        what = f"the {name} is {width} x {height}, the {other_name} {other_width} x {other_height}"
        yield Problem(what, why="they would not lie over each other", fix=f"give a {name} of the {other_name}'s shape")
