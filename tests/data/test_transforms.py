"""Resize, crop, mirror: pixels against their definitions."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from fluxsmith.data.buckets import BucketRule, Placement
from fluxsmith.data.transforms import (
    FILTERS,
    Jitter,
    PixelPlan,
    filter_for,
    loss_mask,
    pixels,
    random_crop,
    random_jitter,
    resize,
    to_tensor,
)
from fluxsmith.data.types import Size


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    array = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(array if channels == 3 else array[:, :, 0])


def area_weights(length: int, count: int) -> np.ndarray:
    """Share of each old pixel in each new one, from the overlap of their intervals."""
    weights = np.zeros((count, length))
    for new in range(count):
        low, high = new * length / count, (new + 1) * length / count
        for old in range(length):
            weights[new, old] = max(0.0, min(high, old + 1) - max(low, old)) * count / length
    return weights


@pytest.mark.ledger("KS-40")
@pytest.mark.parametrize(
    ("size", "target"), [((40, 30), (16, 12)), ((41, 29), (17, 11)), ((64, 64), (32, 64)), ((7, 5), (20, 9)), ((9, 31), (1, 1))]
)
def test_area_is_the_mean_over_the_covered_part(size: tuple[int, int], target: tuple[int, int]) -> None:
    image = noise(*size)
    rows, columns = area_weights(size[1], target[1]), area_weights(size[0], target[0])
    expected = np.einsum("ij,jkc,lk->ilc", rows, np.asarray(image, dtype=np.float64), columns)
    assert np.abs(np.asarray(resize(image, Size(*target), "area")) - expected).max() <= 0.501


@pytest.mark.ledger("KS-40")
@pytest.mark.parametrize("name", sorted(FILTERS))
def test_named_filters_are_pillows(name: str) -> None:
    image, target = noise(40, 30), Size(23, 47)
    assert np.array_equal(np.asarray(resize(image, target, name)), np.asarray(image.resize(target, FILTERS[name])))  # type: ignore[arg-type]


@pytest.mark.ledger("KS-40")
def test_the_filters_differ() -> None:
    image, target = noise(40, 30), Size(23, 17)
    results = {name: resize(image, target, name).tobytes() for name in (*FILTERS, "area")}  # type: ignore[arg-type]
    assert len(set(results.values())) == len(results)


@pytest.mark.ledger("KS-40")
def test_auto_is_area_unless_a_side_grows() -> None:
    assert filter_for(Size(100, 100), Size(50, 50), "auto") == "area"
    assert filter_for(Size(100, 100), Size(100, 50), "auto") == "area"
    assert filter_for(Size(100, 100), Size(101, 50), "auto") == "lanczos"
    assert filter_for(Size(100, 100), Size(50, 50), "bicubic") == "bicubic"


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    image = noise(32, 32)
    assert resize(image, Size(32, 32), "lanczos") is image


def test_pixels_are_the_window_in_minus_one_to_one() -> None:
    image = noise(64, 48)
    placement = Placement(Size(32, 16), Size(64, 48), 5, 7)
    tensor = pixels(image, PixelPlan(placement))
    expected = np.asarray(image)[7:23, 5:37].astype(np.float64) / 127.5 - 1
    assert tensor.shape == (3, 16, 32)
    assert torch.allclose(tensor, torch.from_numpy(expected).permute(2, 0, 1).float(), atol=1e-6)
    assert torch.equal(pixels(image, PixelPlan(placement, flipped=True)), tensor.flip(-1))


def test_random_crops_reach_every_offset_and_stay_inside() -> None:
    placement = BucketRule(Size(64, 64), enabled=False).place(Size(68, 66))
    assert placement is not None
    rng = random.Random(0)
    placement = placement._replace(resized=Size(68, 66))
    windows = {(window.x, window.y) for window in (random_crop(placement, rng) for _ in range(400))}
    assert windows == {(x, y) for x in range(5) for y in range(3)}


def test_jitter_changes_what_it_says() -> None:
    image = Image.new("RGB", (16, 16), (100, 50, 50))
    placement = Placement(Size(16, 16), Size(16, 16), 0, 0)
    plain = pixels(image, PixelPlan(placement))
    brighter = pixels(image, PixelPlan(placement, jitter=Jitter(brightness=1.5)))
    assert brighter.mean() > plain.mean()
    grey = pixels(image, PixelPlan(placement, jitter=Jitter(saturation=0.0)))
    assert torch.allclose(grey[0], grey[1])
    assert torch.equal(pixels(image, PixelPlan(placement, jitter=Jitter())), plain)
    draws = [random_jitter(0.4, random.Random(seed)) for seed in range(100)]
    assert 0.8 <= min(map(min, draws)) < 0.85
    assert 1.15 < max(map(max, draws)) <= 1.2


def test_to_tensor_spans_the_range() -> None:
    assert to_tensor(Image.new("RGB", (2, 2), (0, 0, 0))).unique().tolist() == [-1.0]
    assert to_tensor(Image.new("RGB", (2, 2), (255, 255, 255))).unique().tolist() == [1.0]


def test_a_loss_mask_follows_the_picture() -> None:
    alpha = Image.new("L", (64, 32), 0)
    alpha.paste(255, (0, 0, 20, 32))
    placement = Placement(Size(48, 32), Size(64, 32), 4, 0)
    mask = loss_mask(alpha, placement)
    assert mask.shape == (1, 4, 6)
    assert mask[0, 0].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert loss_mask(alpha, placement._replace(x=8), flipped=True)[0, 0].tolist() == [0.0, 0.0, 0.0, 0.0, 0.5, 1.0]
