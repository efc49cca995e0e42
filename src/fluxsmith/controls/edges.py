"""Canny's edge detector (Canny 1986) on a colour picture, as OpenCV computes it: Sobel 3 x 3, sum of absolute slopes, eight neighbours.

`edges(picture)` is white on black. Of the three colours, the one with the steepest slope speaks for a pixel.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TAN_22 = round((2**0.5 - 1) * 2**15)  # the slopes' quotient at 22.5 degrees, in 15 bits
NEIGHBOURS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
Ints = NDArray[np.int32]
Mask = NDArray[np.bool_]


def edges(image: Image.Image, low: int = 100, high: int = 200) -> Image.Image:
    """White where slopes are a ridge above `high`, or above `low` and connected with one, RGB."""
    dx, dy, size = _slopes(np.asarray(image.convert("RGB"), dtype=np.int32))
    ridge = _ridges(dx, dy, size) & (size > min(low, high))
    found = _connected(ridge, ridge & (size > max(low, high)))
    return Image.fromarray((found * 255).astype(np.uint8)).convert("RGB")


def _slopes(rgb: Ints) -> tuple[Ints, Ints, Ints]:
    """Slopes to the right and down (H, W) of the steepest colour, and the sum of their absolutes."""
    padded = np.pad(rgb, ((1, 1), (1, 1), (0, 0)), mode="edge")
    down = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    across = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    dx, dy = down[:, 2:] - down[:, :-2], across[2:] - across[:-2]
    size = np.abs(dx) + np.abs(dy)
    steepest = size.argmax(axis=-1)[..., None]
    return tuple(np.take_along_axis(part, steepest, axis=-1)[..., 0] for part in (dx, dy, size))  # type: ignore[return-value]


def _ridges(dx: Ints, dy: Ints, size: Ints) -> Mask:
    """Where the slope is not less than on either side of it, across the edge."""
    padded = np.pad(size, 1)
    height, width = size.shape

    def at(down: int, right: int) -> Ints:
        return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    run, rise = np.abs(dx) * TAN_22, np.abs(dy) << 15
    flat, steep = rise < run, rise > run + (np.abs(dx) << 16)
    across = (size > at(0, -1)) & (size >= at(0, 1))
    upright = (size > at(-1, 0)) & (size >= at(1, 0))
    falling = (size > at(-1, -1)) & (size > at(1, 1))
    rising = (size > at(-1, 1)) & (size > at(1, -1))
    slanted = np.where((dx ^ dy) < 0, rising, falling)
    return np.where(flat, across, np.where(steep, upright, slanted))


def _connected(weak: Mask, strong: Mask) -> Mask:
    """All of `weak` that hangs together with `strong`."""
    width = weak.shape[1] + 2
    left = np.pad(weak, 1).ravel()
    found = np.zeros_like(left)
    reached = np.flatnonzero(np.pad(strong, 1))
    steps = np.array([down * width + right for down, right in NEIGHBOURS])
    while len(reached):
        found[reached], left[reached] = True, False
        around = (reached[:, None] + steps).ravel()
        reached = np.unique(around[left[around]])
    return found.reshape(-1, width)[1:-1, 1:-1]
