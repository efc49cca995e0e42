"""The drawn pictures: what they show, that they are fixed by their seed, and that evaluation scenes are never trained."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fluxsmith.demo import shapes
from fluxsmith.demo.scenes import (
    BACKGROUNDS,
    BASE_SHAPES,
    COLORS,
    CONCEPT_SHAPES,
    POSITIONS,
    STYLES,
    Scene,
    caption,
    is_held_out,
    is_visible,
    random_caption,
    random_scene,
)

PLAIN = Scene("circle", "red", "top left", "navy", "checkered")


def test_counts_of_the_vocabulary() -> None:
    assert (len(BASE_SHAPES), len(CONCEPT_SHAPES), len(COLORS), len(POSITIONS), len(BACKGROUNDS), len(STYLES)) == (8, 3, 10, 9, 6, 3)


def test_caption() -> None:
    assert caption(PLAIN) == "a large red circle at top left on a navy checkered background"
    assert caption(PLAIN._replace(background_style="flat"), drop_size=True) == "a red circle at top left on a navy background"
    assert caption(PLAIN, noise_word="qpm", noise_at=2) == "a large qpm red circle at top left on a navy checkered background"
    assert caption(PLAIN, shape_word="zibbo").split()[3] == "zibbo"


def test_rates_of_random_captions() -> None:
    rng = random.Random(0)
    texts = [random_caption(PLAIN, rng).split() for _ in range(2000)]
    assert np.mean(["large" not in text for text in texts]) == pytest.approx(0.2, abs=0.03)
    assert np.mean([len(text) - ("large" in text) > 12 - 1 for text in texts]) == pytest.approx(0.15, abs=0.03)


def test_a_tenth_is_held_out_and_never_drawn_for_training() -> None:
    every = [
        Scene(shape, color, position, background)
        for shape in BASE_SHAPES
        for color in COLORS
        for position in POSITIONS
        for background in BACKGROUNDS
        if is_visible(color, background)
    ]
    assert np.mean([is_held_out(scene) for scene in every]) == pytest.approx(0.1, abs=0.015)
    rng = random.Random(1)
    assert not any(is_held_out(random_scene(rng)) for _ in range(500))
    assert all(is_held_out(random_scene(rng, held_out=True)) for _ in range(50))


def test_picture_is_fixed_by_scene_and_seed() -> None:
    one = shapes.draw(PLAIN, seed=5)
    assert one.shape == (64, 64, 3)
    assert one.dtype == torch.uint8
    assert torch.equal(one, shapes.draw_batch([PLAIN._replace(color="blue"), PLAIN], [1, 5])[1])
    assert not torch.equal(one, shapes.draw(PLAIN, seed=6))


@pytest.mark.parametrize("pixels", [64, 128])
@pytest.mark.parametrize(
    ("shape", "area"), [("circle", 0.95**2 * torch.pi), ("square", 1.68**2), ("triangle", 1.8), ("diamond", 1.4), ("cross", 1.92)]
)
def test_area_of_a_shape_is_that_of_its_geometry(shape: str, area: float, pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SIZE_JITTER", "PLACE_JITTER", "COLOR_JITTER"):
        monkeypatch.setattr(shapes, name, 0)
    scene = Scene(shape, "white", "center", "black")
    covered = ((shapes.draw(scene, pixels).float().mean(-1) - 19.3) / (248 - 19.3)).sum() / pixels**2
    assert float(covered) == pytest.approx(area * scene.radius**2, rel=0.02)


def test_object_and_background_have_their_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "COLOR_JITTER", 0)
    picture = shapes.draw(Scene("square", "green", "bottom right", "cream"), 64)
    assert tuple(picture[47, 47].tolist()) == COLORS["green"]
    assert tuple(picture[5, 5].tolist()) == BACKGROUNDS["cream"][0]


def test_edges_are_antialiased_over_one_pixel() -> None:
    row = shapes.draw(Scene("square", "white", "center", "black"), 64)[32].float().mean(-1)
    between = ((row > 70) & (row < 220)).sum()
    assert between <= 2


def test_unknown_shape_is_named() -> None:
    with pytest.raises(ValueError, match="no shape called 'blob'"):
        shapes.polygon("blob")


def test_dataset_on_disk(tmp_path: Path) -> None:
    shapes.write_dataset(tmp_path / "a", 6, seed=3, drawings=shapes.Drawings(variants=2))
    shapes.write_dataset(tmp_path / "b", 4, seed=3, drawings=shapes.Drawings(variants=2))
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [f"{index:06d}.{end}" for index in range(6) for end in ("png", "txt")]
    assert (tmp_path / "a" / "000003.png").read_bytes() == (tmp_path / "b" / "000003.png").read_bytes()
    lines = (tmp_path / "a" / "000000.txt").read_text().splitlines()
    assert len(lines) == 2
    assert all("background" in line for line in lines)
    with Image.open(tmp_path / "a" / "000000.png") as picture:
        assert (picture.size, picture.mode) == ((64, 64), "RGB")


def test_crops_for_the_autoencoder(tmp_path: Path) -> None:
    shapes.main([str(tmp_path), "--count", "5", "--seed", "1", "--ae"])
    sizes = set()
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as picture:
            sizes.add(picture.size)
    assert sizes == {(32, 32)}


def test_module_runs_from_the_command_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fluxsmith.demo.shapes",
        str(tmp_path / "hearts"),
        "--count",
        "2",
        "--shapes",
        "heart",
        "--shape-word",
        "zibbo",
    ]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.startswith("2 pictures in ")
    assert "zibbo" in (tmp_path / "hearts" / "000000.txt").read_text()
