"""The drawn pictures of the demo: signed distance fields, anti-aliased over one pixel, many at a time, on any device.

`python -m fluxsmith.demo.shapes out --count 1000 --seed 0` writes PNG and caption pairs for the ordinary `folder` source;
`--ae` writes 32-pixel crops of larger drawings for the autoencoder. `draw(scene, seed=3)` is one picture.
"""

import argparse
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fluxsmith.demo.scenes import (
    BACKGROUNDS,
    BASE_SHAPES,
    COLORS,
    CONCEPT_SHAPES,
    STYLES,
    Scene,
    random_caption,
    random_scene,
)
from fluxsmith.randomness import python_random

SHAPES = BASE_SHAPES + CONCEPT_SHAPES
FIELD_SIZE = 256  # samples across a stored distance field
FIELD_REACH = 1.4  # radii from the centre to the edge of the field
CHECKS = 4  # cells across a checkered background
SIZE_JITTER, PLACE_JITTER, COLOR_JITTER = 0.07, 0.015, 7
AE_PIXELS = (64, 96, 128)
AE_CROP = 32
AE_CONCEPT_SHARE = 0.1
BATCH = 256


def polygon(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape with straight or finely divided edges, in radii, x to the right, y down."""
    if shape == "square":
        return [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)]
    if shape == "triangle":
        return [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)]
    if shape == "diamond":
        return [(0.0, -1.0), (0.7, 0.0), (0.0, 1.0), (-0.7, 0.0)]
    if shape == "hexagon":
        return [(-1.0, 0.0), (-0.5, -0.8), (0.5, -0.8), (1.0, 0.0), (0.5, 0.8), (-0.5, 0.8)]
    if shape == "cross":
        a, b = 0.95, 0.3
        return [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]
    if shape == "star":
        radii = [1.05 if corner % 2 == 0 else 0.44 for corner in range(10)]
        return [(r * math.sin(k * math.pi / 5), 0.08 - r * math.cos(k * math.pi / 5)) for k, r in enumerate(radii)]
    if shape == "arrow":
        return [(-1.0, -0.3), (0.1, -0.3), (0.1, -0.8), (1.0, 0.0), (0.1, 0.8), (0.1, 0.3), (-1.0, 0.3)]
    return _curved(shape)


def _curved(shape: str, corners: int = 72) -> list[tuple[float, float]]:
    turns = [2 * math.pi * corner / corners for corner in range(corners)]
    if shape == "heart":
        height = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
        return [(math.sin(t) ** 3, -(h + 2.5) / 15.5) for t, h in zip(turns, height, strict=True)]
    if shape == "moon":
        start = math.radians(48)
        outer = [start + (2 * math.pi - 2 * start) * k / (corners // 2) for k in range(corners // 2 + 1)]
        rim = [(math.cos(t) + 0.16, math.sin(t)) for t in outer]
        x, y = rim[0]
        centre, radius = x + 0.12, math.hypot(0.12, y)  # the circle that bites, through both tips
        half = math.atan2(y, x - centre)
        inner = [-half - (2 * math.pi - 2 * half) * k / (corners // 2) for k in range(1, corners // 2)]
        return [(0.95 * px, 0.95 * py) for px, py in rim + [(centre + radius * math.cos(t), radius * math.sin(t)) for t in inner]]
    raise ValueError(f"there is no shape called {shape!r}; shapes are: {', '.join(SHAPES)}")


def _polygon_distance(points: Tensor, corners: list[tuple[float, float]]) -> Tensor:
    """Signed distance of `points` (..., 2) to a polygon, negative inside: nearest edge, sign by crossing number."""
    start = torch.tensor(corners)  # (V, 2)
    end = start.roll(-1, 0)
    edge, offset = end - start, points[..., None, :] - start
    along = ((offset * edge).sum(-1) / edge.square().sum(-1)).clamp(0, 1)
    nearest = (offset - along[..., None] * edge).square().sum(-1).amin(-1).sqrt()
    above = points[..., None, 1] >= start[:, 1]
    crosses = above != (points[..., None, 1] >= end[:, 1])
    side = edge[:, 0] * offset[..., 1] - edge[:, 1] * offset[..., 0]
    left = (side > 0) == (edge[:, 1] > 0)
    inside = (crosses & left).sum(-1) % 2 == 1
    return torch.where(inside, -nearest, nearest)


@lru_cache(maxsize=1)
def distance_fields() -> Tensor:
    """Signed distances of all shapes in radii, on a square of FIELD_REACH radii around the centre: (S, FIELD_SIZE, FIELD_SIZE)."""
    axis = torch.linspace(-FIELD_REACH, FIELD_REACH, FIELD_SIZE)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    radius = points.norm(dim=-1)
    round_shapes = {"circle": radius - 0.95, "ring": (radius - 0.7).abs() - 0.25}
    return torch.stack([round_shapes[name] if name in round_shapes else _polygon_distance(points, polygon(name)) for name in SHAPES])


def draw(scene: Scene, pixels: int = 64, *, seed: int = 0) -> Tensor:
    """One picture, uint8 (pixels, pixels, 3); the seed moves place, size and colours a little."""
    return draw_batch([scene], [seed], pixels)[0]


def draw_batch(scenes: Sequence[Scene], seeds: Sequence[int], pixels: int = 64, *, device: str = "cpu") -> Tensor:
    """Pictures, uint8 (B, pixels, pixels, 3); picture i depends on scene i and seed i only."""
    rows = torch.tensor([_numbers(scene, seed) for scene, seed in zip(scenes, seeds, strict=True)], device=device)  # (B, 17)
    place, radius, shape = rows[:, 0:2], rows[:, 2], rows[:, 3].long()
    color, tones, style, turn = rows[:, 4:7], rows[:, 7:13].view(-1, 2, 3), rows[:, 13].long(), rows[:, 14:16]
    axis = (torch.arange(pixels, device=device) + 0.5) / pixels
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = (torch.stack((x, y), -1) - place[:, None, None]) / radius[:, None, None, None] / FIELD_REACH  # (B, P, P, 2)
    field = distance_fields().to(device)[shape][:, None]
    distance = functional.grid_sample(field, grid, padding_mode="border", align_corners=True)[:, 0]
    covered = (0.5 - distance * radius[:, None, None] * pixels).clamp(0, 1)[..., None]
    ramp = ((x - 0.5) * turn[:, 0, None, None] + (y - 0.5) * turn[:, 1, None, None] + 0.5).clamp(0, 1)
    checks = ((x * CHECKS).floor() + (y * CHECKS).floor()).remainder(2).expand_as(ramp)
    blend = torch.stack((torch.zeros_like(ramp), ramp, checks), 1)[torch.arange(len(rows), device=device), style][..., None]
    behind = torch.lerp(tones[:, 0, None, None], tones[:, 1, None, None], blend)
    return torch.lerp(behind, color[:, None, None].expand_as(behind), covered).round().clamp(0, 255).to(torch.uint8)


def _numbers(scene: Scene, seed: int) -> list[float]:
    """A scene with its jitter as numbers, in the order in which `draw_batch` reads them."""
    rng = python_random(seed, "draw")
    x, y = (value + rng.uniform(-PLACE_JITTER, PLACE_JITTER) for value in scene.centre)
    radius = scene.radius * (1 + rng.uniform(-SIZE_JITTER, SIZE_JITTER))

    def near(color: tuple[int, int, int]) -> list[float]:
        return [min(255.0, max(0.0, channel + rng.uniform(-COLOR_JITTER, COLOR_JITTER))) for channel in color]

    first, second = BACKGROUNDS[scene.background]
    turn = rng.choice(((0.0, 1.0), (0.0, -1.0), (1.0, 0.0), (-1.0, 0.0), (0.5, 0.5), (-0.5, 0.5)))
    colors = [*near(COLORS[scene.color]), *near(first), *near(second)]
    return [x, y, radius, float(SHAPES.index(scene.shape)), *colors, float(STYLES.index(scene.background_style)), *turn]


class Drawings(NamedTuple):
    """What a data set shows. `variants` captions a picture stand in lines of one file (for `captions.wildcards`);
    `shape_word` replaces the shape's name, as a trigger."""

    shapes: Sequence[str] = BASE_SHAPES
    styles: Sequence[str] = STYLES
    pixels: int = 64
    variants: int = 1
    shape_word: str = ""


PLAIN = Drawings()


def write_dataset(folder: Path, count: int, *, seed: int = 0, drawings: Drawings = PLAIN) -> None:
    """`count` pictures (PNG) of training scenes with captions (.txt), for the ordinary `folder` source."""
    shapes, styles, pixels, variants, shape_word = drawings
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, count, BATCH):
        indices = range(start, min(start + BATCH, count))
        rngs = [python_random(seed, "scene", index) for index in indices]
        scenes = [random_scene(rng, shapes=shapes, styles=styles) for rng in rngs]
        pictures = draw_batch(scenes, [rng.getrandbits(62) for rng in rngs], pixels)
        for index, rng, scene, picture in zip(indices, rngs, scenes, pictures, strict=True):
            lines = [random_caption(scene, rng, shape_word=shape_word) for _ in range(variants)]
            _write(folder / f"{index:06d}.png", picture, "\n".join(lines))


def write_crops(folder: Path, count: int, *, seed: int = 0) -> None:
    """`count` random AE_CROP-pixel crops of drawings of several sizes, a tenth with concept shapes, for the autoencoder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rng = python_random(seed, "crop", index)
        shapes = CONCEPT_SHAPES if rng.random() < AE_CONCEPT_SHARE else BASE_SHAPES
        pixels = rng.choice(AE_PIXELS)
        scene = random_scene(rng, shapes=shapes, sizes=("large", "large", "small"), held_out=None)
        picture = draw(scene, pixels, seed=rng.getrandbits(62))
        x, y = (rng.randint(0, pixels - AE_CROP) for _ in range(2))
        _write(folder / f"{index:06d}.png", picture[y : y + AE_CROP, x : x + AE_CROP], "a drawing")


def _write(path: Path, picture: Tensor, text: str) -> None:
    Image.fromarray(picture.numpy()).save(path)
    path.with_suffix(".txt").write_text(f"{text}\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the generator."""
    parser = argparse.ArgumentParser(prog="python -m fluxsmith.demo.shapes", description="draw pictures with captions")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--variants", type=int, default=1, help="captions in each text file, one a line")
    parser.add_argument("--shapes", nargs="+", default=list(BASE_SHAPES), choices=SHAPES)
    parser.add_argument("--styles", nargs="+", default=list(STYLES), choices=STYLES)
    parser.add_argument("--shape-word", default="", help="a trigger in place of the shape's name")
    parser.add_argument("--ae", action="store_true", help="small crops for the autoencoder")
    options = parser.parse_args(arguments)
    if options.ae:
        write_crops(options.out, options.count, seed=options.seed)
    else:
        drawings = Drawings(options.shapes, options.styles, options.pixels, options.variants, options.shape_word)
        write_dataset(options.out, options.count, seed=options.seed, drawings=drawings)
    print(f"{options.count} pictures in {options.out}")


if __name__ == "__main__":
    main()
