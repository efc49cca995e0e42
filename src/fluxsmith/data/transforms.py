"""From a decoded picture to the pixels of its bucket: resize, crop, mirror, colour changes, tensor in [-1, 1].

`pixels(image, plan)` does all of it; every random choice is already a number in the `PixelPlan`.
"""

import random
from typing import NamedTuple

import numpy
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.nn.functional import interpolate

from fluxsmith.config.dataset import Interpolation
from fluxsmith.data.augment import Tint, tinted
from fluxsmith.data.buckets import Placement
from fluxsmith.data.types import Size

FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
}


class Jitter(NamedTuple):
    """Factors on brightness, contrast and saturation; 1 changes nothing."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


class PixelPlan(NamedTuple):
    """What happens to one picture once it is decoded."""

    placement: Placement
    interpolation: Interpolation = "auto"
    flipped: bool = False
    jitter: Jitter = Jitter()
    tint: Tint = Tint()


def pixels(image: Image.Image, plan: PixelPlan) -> Tensor:
    """An RGB picture as (3, H, W) float32 in [-1, 1], H and W being the bucket's."""
    placement = plan.placement
    image = resize(image, placement.resized, plan.interpolation)
    image = crop(image, placement)
    image = tinted(color_jitter(image, plan.jitter), plan.tint)
    tensor = to_tensor(image)
    return tensor.flip(-1) if plan.flipped else tensor


def filter_for(size: Size, target: Size, interpolation: Interpolation) -> Interpolation:
    """What `auto` means for this picture: area when no side grows, else Lanczos (as sd-scripts)."""
    if interpolation != "auto":
        return interpolation
    return "area" if target.width <= size.width and target.height <= size.height else "lanczos"


def resize(image: Image.Image, target: Size, interpolation: Interpolation) -> Image.Image:
    """The picture at exactly `target`; unchanged when it has that size."""
    size = Size(*image.size)
    if size == target:
        return image
    chosen = filter_for(size, target, interpolation)
    if chosen == "area":
        return _area(image, target)
    return image.resize(target, FILTERS[chosen])


def crop(image: Image.Image, placement: Placement) -> Image.Image:
    """The bucket's window of a resized picture."""
    return image.crop((placement.x, placement.y, placement.x + placement.bucket.width, placement.y + placement.bucket.height))


def random_crop(placement: Placement, rng: random.Random) -> Placement:
    """The same placement with its window anywhere in the resized picture, each offset equally likely."""
    x = rng.randint(0, placement.resized.width - placement.bucket.width)
    y = rng.randint(0, placement.resized.height - placement.bucket.height)
    return placement._replace(x=x, y=y)


def random_jitter(strength: float, rng: random.Random) -> Jitter:
    """Factors drawn uniformly from 1 - strength / 2 to 1 + strength / 2."""
    return Jitter(*(1.0 + strength * (rng.random() - 0.5) for _ in Jitter._fields))


def color_jitter(image: Image.Image, jitter: Jitter) -> Image.Image:
    """Brightness, then contrast, then saturation."""
    for change, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), jitter, strict=True):
        if factor != 1.0:
            image = change(image).enhance(factor)
    return image


def to_tensor(image: Image.Image) -> Tensor:
    """RGB 0..255 -> (3, H, W) float32 in [-1, 1]."""
    array = numpy.array(image, dtype=numpy.uint8)
    return torch.from_numpy(array).permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0)


def loss_mask(grey: Image.Image, placement: Placement, *, flipped: bool = False) -> Tensor:
    """A grey picture (an alpha channel, a mask) as a loss mask (1, H/8, W/8) in 0..1, averaged over the pixels of each latent."""
    window = crop(resize(grey, placement.resized, "auto"), placement)
    mask = torch.from_numpy(numpy.array(window, dtype=numpy.float32))[None, None] / 255.0  # (1, 1, H, W)
    mask = interpolate(mask, scale_factor=1 / 8, mode="area")[0]
    return mask.flip(-1) if flipped else mask


def _area(image: Image.Image, target: Size) -> Image.Image:
    """Each new pixel is the mean of the old ones under it, those at the edge counting by the part that is covered.

    Pillow's BOX and torch's area mode both round the edges to whole pixels, so they differ from this (and from OpenCV) by up to
    tens of grey levels at odd ratios.
    """
    array = numpy.asarray(image, dtype=numpy.uint8)
    values = array if array.ndim == 3 else array[:, :, None]
    values = _mean_rows(values, target.height)
    values = _mean_rows(numpy.ascontiguousarray(values.transpose(1, 0, 2)), target.width).transpose(1, 0, 2)
    result = numpy.rint(values).clip(0, 255).astype(numpy.uint8)
    return Image.fromarray(result if array.ndim == 3 else result[:, :, 0])


def _mean_rows(values: numpy.ndarray, count: int) -> numpy.ndarray:
    """(N, ...) -> (count, ...) float32: means over `count` equal stretches of the first axis.

    A stretch is the sum of the whole rows from its start, plus the part of the row at its end, less the part before its start.
    """
    length = len(values)
    if length == count:
        return values.astype(numpy.float32)
    edges = numpy.arange(count + 1, dtype=numpy.float64) * (length / count)
    first = numpy.minimum(edges.astype(numpy.int64), length - 1)  # the row that an edge falls into
    part = (edges - first).astype(numpy.float32).reshape(-1, *([1] * (values.ndim - 1)))
    means = numpy.empty((count, *values.shape[1:]), dtype=numpy.float32)
    for new in range(count):  # twenty times faster than add.reduceat
        numpy.add.reduce(values[first[new] : first[new + 1]], axis=0, dtype=numpy.float32, out=means[new])
    at_edges = values[first] * part
    means += at_edges[1:]
    means -= at_edges[:-1]
    means *= numpy.float32(count / length)
    return means
