"""Encode and decode pictures of any size in overlapping, cross-faded tiles, so that memory does not grow with the picture.

Tile sizes are pixels, as in every option. Group norms and attention see one tile only, so results differ slightly
from untiled ones; tiles of at least 512 pixels with 128 overlap keep seams invisible.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """What an autoencoder offers."""

    @property
    def reduction(self) -> int: ...

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class Tiling(NamedTuple):
    """Side of a tile and overlap of neighbours, pixels; both are rounded to whole latent cells."""

    tile: int = 768
    overlap: int = 192

    def cells(self, reduction: int) -> tuple[int, int]:
        """Tile and overlap in latent cells; raises ValueError where no progress would be made."""
        tile, overlap = self.tile // reduction, self.overlap // reduction
        if tile < 1 or not 0 <= overlap < tile:
            raise ValueError(f"tile {self.tile} and overlap {self.overlap} pixels leave no step of {reduction} pixels")
        return tile, overlap


def tiled_decode(codec: Codec, latents: Tensor, tiling: Tiling) -> Tensor:
    """Latents (B, z, h, w) -> pixels (B, 3, 8h, 8w)."""
    tile, overlap = tiling.cells(codec.reduction)
    return _tiled(latents, codec.decode, tile, overlap, grow=codec.reduction, shrink=1)


def tiled_encode(codec: Codec, pixels: Tensor, tiling: Tiling) -> Tensor:
    """Pixels (B, 3, H, W), sides multiples of the reduction -> latents (B, z, H/8, W/8)."""
    reduction = codec.reduction
    if pixels.shape[-1] % reduction or pixels.shape[-2] % reduction:
        raise ValueError(f"sides must be multiples of {reduction}, got {tuple(pixels.shape[-2:])}")
    tile, overlap = tiling.cells(reduction)
    return _tiled(pixels, codec.encode, tile, overlap, grow=1, shrink=reduction)


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """First cells of tiles that cover `length` with at least `overlap`; the last tile is moved back to end at the edge."""
    if length <= tile:
        return [0]
    places = list(range(0, length - tile, tile - overlap))
    return [*places, length - tile]


def _tiled(x: Tensor, run: Callable[[Tensor], Tensor], tile: int, overlap: int, *, grow: int, shrink: int) -> Tensor:
    """Run `run` on tiles of x (cells of `shrink` input pixels) and cross-fade the results (cells of `grow` output pixels)."""
    rows, columns = x.shape[-2] // shrink, x.shape[-1] // shrink
    total: Tensor | None = None
    weight = torch.zeros(1, 1, rows * grow, columns * grow, device=x.device, dtype=torch.float32)
    for top in starts(rows, tile, overlap):
        for left in starts(columns, tile, overlap):
            bottom, right = min(top + tile, rows), min(left + tile, columns)
            part = run(x[..., top * shrink : bottom * shrink, left * shrink : right * shrink]).float()
            share = fade((top, bottom, rows), overlap, grow)[:, None] * fade((left, right, columns), overlap, grow)[None]
            share = share.to(x.device)
            if total is None:
                total = torch.zeros(*part.shape[:2], rows * grow, columns * grow, device=x.device)
            area = (..., slice(top * grow, bottom * grow), slice(left * grow, right * grow))
            total[area] += part * share
            weight[area] += share
    if total is None:
        raise ValueError("nothing to tile: the picture is empty")
    return (total / weight).to(x.dtype)


def fade(span: tuple[int, int, int], overlap: int, grow: int) -> Tensor:
    """Linear ramps over the overlap at inner edges, 1 elsewhere: one weight an output pixel."""
    start, stop, length = span
    ramp = torch.ones((stop - start) * grow)
    width = min(overlap * grow, len(ramp))
    if width:
        slope = (torch.arange(width) + 0.5) / width
        if start > 0:
            ramp[:width] = torch.minimum(ramp[:width], slope)
        if stop < length:
            ramp[-width:] = torch.minimum(ramp[-width:], slope.flip(0))
    return ramp
