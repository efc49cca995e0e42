"""The judge reads its own drawings, clean, blurred and noisy, and says when there is nothing to read."""

import random

import pytest
import torch
from torch.nn import functional

from fluxsmith.demo.judge import Reading, agrees, judge
from fluxsmith.demo.scenes import Scene, random_scene
from fluxsmith.demo.shapes import SHAPES, draw, draw_batch

COUNT = 330


def accuracy(blur: int, noise: float) -> dict[str, float]:
    rng = random.Random(7)
    scenes = [random_scene(rng, shapes=[SHAPES[index % len(SHAPES)]], held_out=None) for index in range(COUNT)]
    pictures = draw_batch(scenes, range(COUNT)).float()
    if blur > 1:
        channels_first = pictures.permute(0, 3, 1, 2)
        pictures = functional.avg_pool2d(channels_first, blur, 1, blur // 2, count_include_pad=False).permute(0, 2, 3, 1)
    pictures = pictures + noise * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    found = [agrees(judge(picture), scene) for picture, scene in zip(pictures.round().clamp(0, 255).to(torch.uint8), scenes, strict=True)]
    return {name: sum(one[name] for one in found) / COUNT for name in found[0]}


@pytest.mark.parametrize(("blur", "noise", "least"), [(1, 0, 0.99), (3, 0, 0.95), (3, 8, 0.95)])
def test_reads_drawings(blur: int, noise: float, least: float) -> None:
    assert min(accuracy(blur, noise).values()) >= least


@pytest.mark.parametrize("shape", ["heart", "hexagon", "ring"])
def test_overlap_is_high_for_the_right_shape(shape: str) -> None:
    assert judge(draw(Scene(shape, "red", "center", "cream"), seed=2)).iou > 0.9


def test_a_stretched_shape_overlaps_less() -> None:
    picture = draw(Scene("circle", "red", "center", "cream"), seed=2)
    stretched = picture[16:48].repeat_interleave(2, 0)
    assert judge(stretched).iou < judge(picture).iou - 0.1


def test_empty_picture_has_no_object() -> None:
    empty = torch.tensor([22, 30, 82], dtype=torch.uint8).expand(64, 64, 3)
    assert judge(empty) == Reading("", "", "", "navy", 0.0)


def test_specks_do_not_move_the_object() -> None:
    scene = Scene("star", "yellow", "bottom right", "navy")
    picture = draw(scene, seed=1)
    picture[2:4, 2:5] = torch.tensor([248, 220, 40], dtype=torch.uint8)
    assert all(agrees(judge(picture), scene).values())
