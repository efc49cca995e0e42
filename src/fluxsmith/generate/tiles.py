"""Tiled denoising: a picture larger than the transformer is used to is predicted in overlapping windows that fade into each other.

After MultiDiffusion (Bar-Tal et al. 2023). Every conditioner gets its part of the picture, so all controls work in tiles.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fluxsmith.models.stream import Conditioner, Window
from fluxsmith.models.tiling import Tiling, fade, starts

Predict = Callable[[Tensor, Sequence[Conditioner]], Tensor]


def windows(rows: int, columns: int, tiling: Tiling, reduction: int) -> Iterator[Window]:
    """Windows of even sides that cover latents (rows, columns), in latent cells."""
    tile, overlap = (max(2, length // 2 * 2) for length in tiling.cells(reduction))
    for top in starts(rows, tile, overlap):
        for left in starts(columns, tile, overlap):
            yield Window(top, left, min(tile, rows), min(tile, columns), rows, columns)


def in_tiles(x: Tensor, parts: Sequence[Window], controls: Sequence[Conditioner], overlap: int, predict: Predict) -> Tensor:
    """`predict(part of x, conditioners of that part)` in every window, cross-faded over `overlap` cells: the shape of x (B, C, h, w)."""
    total, weight = torch.zeros_like(x), torch.zeros_like(x[:1, :1])
    for window in parts:
        area = (..., slice(window.top, window.top + window.height), slice(window.left, window.left + window.width))
        down = fade((window.top, window.top + window.height, window.rows), overlap, 1)
        across = fade((window.left, window.left + window.width, window.columns), overlap, 1)
        share = (down[:, None] * across[None]).to(x.device)
        total[area] += predict(x[area], [control.tile(window) for control in controls]) * share
        weight[area] += share
    return total / weight
