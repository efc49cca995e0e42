"""Reads a picture back without any learned part: background by its border, object by its mask, shape by overlap with templates.

`judge(picture)` gives shape, colour, place and background names and how well the shape fits (IoU), so that a caption can be
checked against what a model drew.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fluxsmith.demo.scenes import BACKGROUNDS, BASE_SHAPES, COLORS, CONCEPT_SHAPES, POSITIONS, Scene
from fluxsmith.demo.shapes import draw_batch

BOX = 24  # side of the normalised mask
BORDER = 0.05  # share of the width that is looked at for the background
CELL_EDGES = (0.385, 0.615)  # halfway between the centres of neighbouring cells
SURE_OBJECT = 40.0  # RGB distance from the background beyond which a pixel votes for the object's colour
MIN_PIXELS = 12
TEMPLATE_PIXELS = (36, 64, 100)  # a drawing at several sizes gives the edge widths that pictures have
SHAPES = BASE_SHAPES + CONCEPT_SHAPES


class Reading(NamedTuple):
    """What is seen; names are empty when there is no object."""

    shape: str
    color: str
    position: str
    background: str
    iou: float


def agrees(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Which of the four parts of a caption the picture shows."""
    return {name: getattr(reading, name) == getattr(scene, name) for name in ("shape", "color", "position", "background")}


def judge(picture: Tensor) -> Reading:
    """Reads a square picture (H, W, 3), uint8."""
    image = picture.float()
    background = _background(image)
    behind = _segment_distance(image, background)
    color = _color(image, behind)
    if not color:
        return Reading("", "", "", background, 0.0)
    mask = _object_mask(image, behind, color)
    solid = _largest_part(mask > 0.5)
    if int(solid.sum()) < MIN_PIXELS:
        return Reading("", color, "", background, 0.0)
    shape, iou = _shape(mask * solid)
    return Reading(shape, color, _position(solid), background, iou)


def _segment_distance(image: Tensor, background: str) -> Tensor:
    """Distance of every pixel to the line of colours between the two tones of a background, (H, W)."""
    first, second = torch.tensor(BACKGROUNDS[background], dtype=torch.float32)
    line = second - first
    along = ((image - first) @ line / line.square().sum()).clamp(0, 1)
    return (image - first - along[..., None] * line).norm(dim=-1)


def _background(image: Tensor) -> str:
    edge = max(1, round(image.shape[0] * BORDER))
    inner = image.new_ones(image.shape[:2], dtype=torch.bool)
    inner[edge:-edge, edge:-edge] = False
    border = image[inner]
    return min(BACKGROUNDS, key=lambda name: _segment_distance(border, name).median().item())


def _color(image: Tensor, behind: Tensor) -> str:
    """The palette colour nearest to the mean of what is surely not background, as most of those pixels see it."""
    sure = image[behind > SURE_OBJECT]
    if len(sure) < MIN_PIXELS:
        return ""
    palette = torch.tensor(list(COLORS.values()), dtype=torch.float32)
    votes = torch.cdist(sure, palette).argmin(-1).bincount(minlength=len(COLORS))
    agreeing = sure[torch.cdist(sure, palette).argmin(-1) == votes.argmax()]
    return tuple(COLORS)[int(torch.cdist(agreeing.mean(0, keepdim=True), palette).argmin())]


def _object_mask(image: Tensor, behind: Tensor, color: str) -> Tensor:
    """How much of each pixel is object, 0..1, by its distances to the object's colour as drawn and to the background."""
    palette = torch.tensor(COLORS[color], dtype=torch.float32)
    near = (image - palette).norm(dim=-1)
    chosen = image[(near < behind) & (behind > SURE_OBJECT)]
    object_color = chosen.median(0).values if len(chosen) >= MIN_PIXELS else palette
    away = (image - object_color).norm(dim=-1)
    return behind / (behind + away).clamp_min(1e-6)


def _largest_part(mask: Tensor) -> Tensor:
    """The largest connected part (8 neighbours): labels spread until nothing changes."""
    height, width = mask.shape
    labels = (torch.arange(1, height * width + 1, dtype=torch.float32).view(height, width)) * mask
    while True:
        spread = functional.max_pool2d(labels[None], 3, 1, 1)[0] * mask
        if torch.equal(spread, labels):
            break
        labels = spread
    counts = labels.long().flatten().bincount()
    counts[0] = 0
    return labels == counts.argmax()


def _position(solid: Tensor) -> str:
    height, width = solid.shape
    y, x = (index.float().mean() + 0.5 for index in solid.nonzero(as_tuple=True))
    row, column = (sum(float(share) > edge for edge in CELL_EDGES) for share in (y / height, x / width))
    return POSITIONS[3 * row + column]


def _normalised(mask: Tensor) -> Tensor:
    """The object's box, its aspect kept, in the middle of BOX x BOX samples."""
    rows, columns = (mask > 0.5).nonzero(as_tuple=True)
    height, width = mask.shape
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    half = max(bottom - top, right - left) / 2
    axis = (torch.arange(BOX) + 0.5) / BOX * 2 - 1
    y = ((top + bottom) / 2 + axis * half) / height * 2 - 1
    x = ((left + right) / 2 + axis * half) / width * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    return functional.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]


@lru_cache(maxsize=1)
def _templates() -> tuple[Tensor, list[int]]:
    """Normalised masks (K, BOX, BOX) of all shapes, sharp and slightly blurred, at several sizes; which shape each one is."""
    masks, owners = [], []
    for pixels in TEMPLATE_PIXELS:
        scenes = [Scene(shape, "white", "center", "black") for shape in SHAPES]
        for owner, picture in enumerate(draw_batch(scenes, range(len(SHAPES)), pixels)):
            mask = ((picture.float().mean(-1) - 18) / 230).clamp(0, 1)
            blurred = functional.avg_pool2d(mask[None], 3, 1, 1, count_include_pad=False)[0]
            masks += [_normalised(mask), _normalised(blurred)]
            owners += [owner, owner]
    return torch.stack(masks), owners


def _shape(mask: Tensor) -> tuple[str, float]:
    """The shape whose template overlaps best, and the overlap (sum of minima over sum of maxima)."""
    templates, owners = _templates()
    seen = _normalised(mask)
    overlap = torch.minimum(templates, seen).sum((1, 2)) / torch.maximum(templates, seen).sum((1, 2))
    best = int(overlap.argmax())
    return SHAPES[owners[best]], round(float(overlap[best]), 4)
