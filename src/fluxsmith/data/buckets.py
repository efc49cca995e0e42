"""Which size each picture is brought to: aspect ratio buckets, and the resize and crop that lead there.

The rule is that of sd-scripts (`library/model_util.py`, `library/train_util.py`), to the pixel:
`rule_for(config).place(Size(1920, 1080))` gives bucket, resized size and centre-crop offset.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fluxsmith.config.dataset import DatasetConfig
from fluxsmith.data.types import Size
from fluxsmith.errors import ConfigError

GRID = 16  # FLUX packs 2 x 2 latents of 8 pixels: a side is a multiple of 16


class Placement(NamedTuple):
    """How one picture reaches its bucket; `x`, `y` is where the crop begins inside the resized picture."""

    bucket: Size
    resized: Size
    x: int
    y: int


def bucket_list(resolution: Size, *, shortest: int, longest: int, step: int) -> list[Size]:
    """All buckets of at most the area of `resolution`, sides multiples of `step` within the limits, sorted.

    The square of that area is always one of them, even when the limits leave nothing else.
    """
    area = resolution.width * resolution.height
    side = int(math.sqrt(area) // step) * step
    found = {Size(side, side)}
    for width in range(shortest, longest + 1, step):
        height = min(longest, int(area // width // step) * step)
        if height >= shortest:
            found |= {Size(width, height), Size(height, width)}
    return sorted(found)


def center_crop(resized: Size, bucket: Size) -> tuple[int, int]:
    """Offset of the centre crop, rounded down."""
    return (resized.width - bucket.width) // 2, (resized.height - bucket.height) // 2


def covering(size: Size, bucket: Size) -> Size:
    """The picture's size once it just covers the bucket, sides rounded half up."""
    is_wider = size.width * bucket.height > bucket.width * size.height  # then the heights are matched
    scale = bucket.height / size.height if is_wider else bucket.width / size.width
    return Size(int(size.width * scale + 0.5), int(size.height * scale + 0.5))


def _floor_to(value: float, step: int) -> int:
    whole = int(value + 0.5)
    return whole - whole % step


@dataclass(frozen=True)
class BucketRule:
    """Assigns pictures to buckets; make one with `rule_for`."""

    resolution: Size
    enabled: bool = True
    upscale: bool = True
    shortest: int = 256
    longest: int = 2048
    step: int = 64

    @cached_property
    def buckets(self) -> list[Size]:
        """Every bucket there can be; empty when buckets are made to measure (`upscale` off)."""
        if not self.enabled:
            return [self.resolution]
        return bucket_list(self.resolution, shortest=self.shortest, longest=self.longest, step=self.step) if self.upscale else []

    @cached_property
    def _by_aspect(self) -> list[tuple[float, Size]]:
        """Aspects, rising; of equal aspects the first in bucket order stays, which is the one a linear search would find."""
        first: dict[float, Size] = {}
        for bucket in self.buckets:
            first.setdefault(bucket.width / bucket.height, bucket)
        return sorted(first.items())

    def place(self, size: Size) -> Placement | None:
        """Bucket, resized size and centre crop of a picture of `size`; None when it is smaller than one step (`upscale` off)."""
        if not self.enabled:
            bucket, resized = self.resolution, covering(size, self.resolution)
        elif self.upscale:
            bucket = self._closest(size)
            resized = covering(size, bucket)
        else:
            resized = self._shrunk(size)
            bucket = Size(resized.width - resized.width % self.step, resized.height - resized.height % self.step)
            if 0 in bucket:
                return None
        return Placement(bucket, resized, *center_crop(resized, bucket))

    def _closest(self, size: Size) -> Size:
        """The bucket of exactly this size, else the one whose width / height differs least (not the log ratio: as sd-scripts)."""
        if size in self.buckets:
            return size
        aspect = size.width / size.height
        table = self._by_aspect
        right = bisect_left(table, (aspect,))
        nearby = table[max(0, right - 1) : right + 1]
        least = min(abs(ratio - aspect) for ratio, _ in nearby)
        return min(bucket for ratio, bucket in nearby if abs(ratio - aspect) == least)  # a tie goes to the first in bucket order

    def _shrunk(self, size: Size) -> Size:
        """Never enlarged: a picture of more than the area is scaled to it, one side rounded down to the step.

        Of the two sides the one is rounded whose rounding changes the aspect less.
        """
        area = self.resolution.width * self.resolution.height
        if size.width * size.height <= area:
            return size
        aspect = size.width / size.height
        width = math.sqrt(area * aspect)
        by_width = _floor_to(width, self.step)
        by_height = _floor_to(area / width, self.step)
        height_then = _floor_to(by_width / aspect, self.step)
        width_then = _floor_to(by_height * aspect, self.step)
        error_by_width = abs(by_width / height_then - aspect) if height_then else math.inf
        error_by_height = abs(width_then / by_height - aspect) if by_height else math.inf
        if error_by_width < error_by_height:
            return Size(by_width, int(by_width / aspect + 0.5))
        return Size(int(by_height * aspect + 0.5), by_height)


def rule_for(config: DatasetConfig) -> BucketRule:
    """The rule of a dataset's options. Raises ConfigError when no bucket can exist."""
    resolution = Size(config.resolution, config.resolution) if isinstance(config.resolution, int) else Size(*config.resolution)
    buckets = config.buckets
    step = buckets.step
    if buckets.enabled and (step < GRID or step % GRID):
        raise ConfigError(
            f"buckets.step = {step} is not a multiple of {GRID}",
            why="FLUX works on 16 x 16 pixel patches",
            fix=f"set buckets.step = {max(GRID, round(step / GRID) * GRID)}",
        )
    if not buckets.enabled and (resolution.width % GRID or resolution.height % GRID):
        near = [max(GRID, side // GRID * GRID) for side in resolution]
        raise ConfigError(
            f"resolution {resolution.width} x {resolution.height} is not a multiple of {GRID}",
            why="without buckets it is the size of every picture",
            fix=f"set resolution = [{near[0]}, {near[1]}], or buckets.enabled = true",
        )
    if buckets.enabled and math.sqrt(resolution.width * resolution.height) < step:
        side = int(math.sqrt(resolution.width * resolution.height))
        raise ConfigError(
            f"resolution {resolution.width} x {resolution.height} is smaller than buckets.step = {step}",
            fix=f"set buckets.step = {side // GRID * GRID}" if side >= GRID else f"set resolution to at least {GRID}",
        )
    shortest = min(buckets.min, *resolution)
    return BucketRule(
        resolution,
        enabled=buckets.enabled,
        upscale=buckets.upscale,
        shortest=max(step, shortest // step * step),
        longest=-(-max(buckets.max, *resolution) // step) * step,
        step=step,
    )
