"""Random changes of a picture as numbers: slight changes of hue or gamma, and crops around a face that the file name locates.

The draws are made here, `transforms.pixels` applies them: `PixelPlan(face_placement(...), tint=random_tint(rng))`.
"""

import random
import re
from typing import NamedTuple

import numpy
from PIL import Image

from fluxsmith.data.buckets import Placement
from fluxsmith.data.types import Size

TINTED = 0.33  # share of uses that color_aug changes, as in sd-scripts
HUE = 16.0  # largest shift, degrees (8 of OpenCV's half degrees)
GAMMA = (0.95, 1.05)
_FACE = re.compile(r"(?P<name>.+)_(\d+)_(\d+)_(\d+)_(\d+)")


class Tint(NamedTuple):
    """A turn of the hue in degrees, and an exponent on values in 0..1; the defaults change nothing."""

    hue: float = 0.0
    gamma: float = 1.0


class Face(NamedTuple):
    """A face in a picture: centre and size, pixels."""

    x: int
    y: int
    width: int
    height: int


def random_tint(rng: random.Random) -> Tint:
    """Two uses of three stay as they are; of the others half have another hue and half another gamma."""
    if rng.random() >= TINTED:
        return Tint()
    return Tint(hue=rng.uniform(-HUE, HUE)) if rng.random() < 0.5 else Tint(gamma=rng.uniform(*GAMMA))


def tinted(image: Image.Image, tint: Tint) -> Image.Image:
    """An RGB picture with its hue turned and its gamma changed."""
    if tint == Tint():
        return image
    values = numpy.asarray(image, dtype=numpy.float32) / 255.0
    if tint.hue:
        values = _turned(values, tint.hue)
    if tint.gamma != 1.0:
        values = values**tint.gamma
    return Image.fromarray(numpy.rint(values * 255.0).clip(0, 255).astype(numpy.uint8))


def _turned(rgb: numpy.ndarray, degrees: float) -> numpy.ndarray:
    """(H, W, 3) in 0..1 with another hue; value and saturation (HSV) stay."""
    value, least = rgb.max(axis=2), rgb.min(axis=2)
    spread = value - least
    safe = numpy.where(spread > 0, spread, 1.0)
    red, green, blue = (rgb[:, :, channel] for channel in range(3))
    sixth = numpy.where(value == red, (green - blue) / safe, numpy.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4))
    sixth = sixth + degrees / 60.0
    channels = []
    for offset in (5.0, 3.0, 1.0):  # the closed form of HSV to RGB: each channel is a trapezoid over the hue circle
        place = (offset + sixth) % 6.0
        channels.append(value - spread * numpy.minimum(place, 4.0 - place).clip(0.0, 1.0))
    return numpy.stack(channels, axis=2)


def face_in_name(stem: str) -> Face | None:
    """The face that a file name ending in `_cx_cy_w_h` locates."""
    match = _FACE.fullmatch(stem)
    if match is None:
        return None
    face = Face(*map(int, match.groups()[1:]))
    return face if face.width and face.height else None


def name_without_face(stem: str) -> str | None:
    """The part of a file name before `_cx_cy_w_h`; None when it has none."""
    match = _FACE.fullmatch(stem)
    return match["name"] if match else None


def face_placement(size: Size, face: Face, bucket: Size, *, factors: tuple[float, float], rng: random.Random | None) -> Placement:
    """A resize and crop with the face in the middle, as far as the picture reaches.

    Args:
        size: of the picture.
        face: in it.
        bucket: what is cut out.
        factors: the shorter side of the cut is the face times a factor between these; never enlarged for it, always covering.
        rng: draws the scale; None takes the middle of the two.
    """
    covering = max(bucket.width / size.width, bucket.height / size.height)
    side, length = min(bucket), max(face.width, face.height)
    smallest = max(covering, min(1.0, side / (length * factors[1])))
    largest = max(smallest, min(1.0, side / (length * factors[0])))
    scale = rng.uniform(smallest, largest) if rng else (smallest + largest) / 2
    resized = Size(max(bucket.width, int(size.width * scale + 0.5)), max(bucket.height, int(size.height * scale + 0.5)))
    x = int(face.x * resized.width / size.width + 0.5) - bucket.width // 2
    y = int(face.y * resized.height / size.height + 0.5) - bucket.height // 2
    return Placement(bucket, resized, _within(x, resized.width - bucket.width), _within(y, resized.height - bucket.height))


def shifted_around(placement: Placement, face: Face, size: Size, rng: random.Random) -> Placement:
    """The same crop moved at random so that the face stays inside; not moved where the face is larger than the crop."""
    bucket, resized = placement.bucket, placement.resized
    across, down = resized.width / size.width, resized.height / size.height
    x = _drawn(placement.x, face.x * across, face.width * across / 2, (bucket.width, resized.width), rng)
    y = _drawn(placement.y, face.y * down, face.height * down / 2, (bucket.height, resized.height), rng)
    return placement._replace(x=x, y=y)


def _drawn(centred: int, middle: float, half: float, sides: tuple[int, int], rng: random.Random) -> int:
    window, length = sides
    low, high = int(max(0, -(-(middle + half - window) // 1))), int(min(length - window, middle - half))
    return rng.randint(low, high) if low <= high else centred


def _within(offset: int, most: int) -> int:
    return max(0, min(offset, most))
