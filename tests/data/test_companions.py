"""Loss masks and condition pictures: found by name, placed as their pictures, cached without mistakes, and refused when they do not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fluxsmith.data.buckets import Placement
from fluxsmith.data.companions import LISTED, mismatch
from fluxsmith.data.types import Size
from fluxsmith.errors import DataError

pytestmark = pytest.mark.ledger("KS-42")
OFF = {"latents": "off", "text": "off"}
CACHES = [pytest.param({}, id="disk"), pytest.param({"latents": "memory"}, id="memory"), pytest.param(OFF, id="off")]


def grey(width: int, height: int, seed: int) -> Image.Image:
    """Blocks of black, white and greys."""
    low = np.random.default_rng(seed).integers(0, 256, (max(1, height // 16), max(1, width // 16)), dtype=np.uint8)
    return Image.fromarray(low).resize((width, height), Image.Resampling.NEAREST)


def put(folder: Path, name: str, *, seed: int = 0, size: tuple[int, int] = (128, 96), alpha: bool = False) -> None:
    """A picture whose three channels are its mask (so that both can be compared), with that as transparency or not."""
    folder.mkdir(exist_ok=True)
    channel = grey(*size, seed)
    image = Image.merge("RGB", [channel] * 3)
    if alpha:
        image.putalpha(channel)
    image.save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(name)


def masks(folder: Path, pictures: Path, *, scale: float = 1.0) -> Path:
    """Each picture as its own mask."""
    folder.mkdir(exist_ok=True)
    for path in pictures.glob("*.png"):
        image = Image.open(path).convert("RGB")
        image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.NEAREST).save(folder / path.name)
    return folder


def from_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """The mask that equals the picture: its red channel in 0..1, averaged over each latent."""
    return torch.nn.functional.avg_pool2d((pixels[:, :1] + 1) / 2, 8)


def batches(data: Any, epochs: int = 1) -> list[Any]:
    return [data.load(spec, step=0) for epoch in range(epochs) for spec in data.batches(epoch)]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number, size in enumerate([(128, 96), (96, 128), (160, 96), (100, 100)]):
        put(tmp_path / "pictures", f"{number}", seed=number, size=size)
    return tmp_path / "pictures"


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_mask_lies_on_its_picture_in_every_crop_and_mirrored(workshop: Any, pictures: Path, tmp_path: Path, crop: str) -> None:
    config = workshop.config(pictures, mask_dir=masks(tmp_path / "masks", pictures), flip=True, crop=crop, repeats=6, resolution=48)
    for batch in batches(workshop.prepare(config, cache=OFF)):
        assert batch.mask.shape == (1, 1, batch.pixels.shape[2] // 8, batch.pixels.shape[3] // 8)
        assert torch.allclose(batch.mask, from_pixels(batch.pixels), atol=1e-5)


@pytest.mark.parametrize("cache", CACHES)
def test_cached_masks_are_those_of_the_live_path(workshop: Any, pictures: Path, tmp_path: Path, cache: dict[str, Any]) -> None:
    """The stand-in encoder averages pixels, so that latents show what was encoded."""
    config = workshop.config(pictures, mask_dir=masks(tmp_path / "masks", pictures), flip=True, crop="random", repeats=4)
    for batch in batches(workshop.prepare(config, cache=cache), 2):
        shown = from_pixels(batch.pixels) if batch.latents is None else (batch.latents[:, :1] + 1) / 2
        assert torch.allclose(batch.mask, shown, atol=1e-5)
        assert 0 <= batch.mask.min() <= batch.mask.max() <= 1


def test_transparency_is_a_mask_and_pictures_without_any_are_learned_whole(workshop: Any, tmp_path: Path) -> None:
    put(tmp_path / "pictures", "with", seed=1, alpha=True)
    put(tmp_path / "pictures", "without", seed=2)
    data = workshop.prepare(workshop.config(tmp_path / "pictures", alpha_mask=True, batch_size=2, background=(0, 0, 0)))
    (batch,) = batches(data)
    by_key = dict(zip(batch.keys, batch.mask, strict=True))
    assert torch.equal(by_key["without.png"], torch.ones_like(by_key["without.png"]))
    expected = torch.nn.functional.avg_pool2d(torch.from_numpy(np.asarray(grey(128, 96, 1).copy(), dtype=np.float32))[None] / 255, 16)
    assert by_key["with.png"].min() < 0.5
    assert by_key["with.png"].mean() == pytest.approx(expected.mean().item(), abs=0.1)
    assert "masks cache: 1 new" in data.cache_summary
    assert data.report.datasets[0].masks == 1


def test_switching_masks_off_removes_them_and_a_changed_mask_is_noticed(workshop: Any, pictures: Path, tmp_path: Path) -> None:
    folder = masks(tmp_path / "masks", pictures)
    config = workshop.config(pictures, mask_dir=folder)
    first = workshop.prepare(config)
    before = {batch.keys[0]: batch.mask for batch in batches(first)}
    again = workshop.prepare(config)
    assert workshop.encoders.pictures == 0
    assert "masks cache: 4 valid" in again.cache_summary
    off = workshop.prepare(workshop.config(pictures))
    assert all(batch.mask is None for batch in batches(off))
    assert (workshop.encoders.pictures, off.digest != first.digest) == (0, True)
    Image.new("RGB", (128, 96), (255, 0, 0)).save(folder / "0.png")
    changed = workshop.prepare(config)
    assert workshop.encoders.pictures == 0, "latents do not depend on masks"
    assert changed.digest != first.digest
    after = {batch.keys[0]: batch.mask for batch in batches(changed)}
    assert torch.equal(after["0.png"], torch.ones_like(after["0.png"])), "the red channel counts"
    assert all(torch.equal(after[key], before[key]) for key in ("1.png", "2.png", "3.png"))
    folder.rename(tmp_path / "moved")
    assert workshop.prepare(workshop.config(pictures, mask_dir=tmp_path / "moved")).digest == changed.digest


def test_a_mask_wins_over_transparency(workshop: Any, tmp_path: Path) -> None:
    put(tmp_path / "pictures", "a", seed=1, alpha=True)
    (tmp_path / "masks").mkdir()
    Image.new("L", (128, 96), 255).save(tmp_path / "masks" / "a.png")
    config = workshop.config(tmp_path / "pictures", alpha_mask=True, mask_dir=tmp_path / "masks")
    assert batches(workshop.prepare(config))[0].mask.min() == 1


def test_a_mask_of_another_size_is_resized_and_one_of_other_proportions_refused(workshop: Any, pictures: Path, tmp_path: Path) -> None:
    exact = batches(workshop.prepare(workshop.config(pictures, mask_dir=masks(tmp_path / "masks", pictures)), cache=OFF))
    double = batches(workshop.prepare(workshop.config(pictures, mask_dir=masks(tmp_path / "double", pictures, scale=2)), cache=OFF))
    assert all(torch.allclose(a.mask, b.mask, atol=0.02) for a, b in zip(exact, double, strict=True))
    Image.new("L", (128, 90), 255).save(tmp_path / "masks" / "0.png")
    with pytest.raises(DataError, match="1 of 4 pictures have problems") as caught:
        workshop.prepare(workshop.config(pictures, mask_dir=tmp_path / "masks"))
    assert "other proportions than its picture (128 x 90, the picture has 128 x 96). Fix: make both the same size" in "\n".join(
        caught.value.lines()
    )


@pytest.mark.parametrize(("size", "fits"), [((128, 96), True), ((64, 48), True), ((43, 32), True), ((128, 95), True), ((96, 128), False)])
def test_a_pixel_of_rounding_is_no_mismatch(size: tuple[int, int], fits: bool) -> None:
    assert (mismatch("mask", Path("a.png"), Size(*size), Size(128, 96)) is None) == fits


@pytest.mark.parametrize("option", ["mask_dir", "condition_dir"])
def test_missing_and_surplus_files_are_listed(workshop: Any, tmp_path: Path, option: str) -> None:
    for number in range(8):
        put(tmp_path / "pictures", f"{number}", seed=number)
    folder = tmp_path / "others"
    folder.mkdir()
    for name in ["0", *(f"typo{number}" for number in range(7))]:
        Image.new("L", (128, 96)).save(folder / f"{name}.png")
    with pytest.raises(DataError) as caught:
        workshop.prepare(workshop.config(tmp_path / "pictures", **{option: folder}))
    lines = "\n".join(caught.value.lines())
    assert "7 pictures have no" in lines
    assert "1.png, 2.png, 3.png, 4.png, 5.png and 2 more" in lines
    assert "7 files belong to no picture: typo0.png" in lines
    assert LISTED == 5
    with pytest.raises(DataError) as caught:
        workshop.prepare(workshop.config(tmp_path / "pictures", **{option: tmp_path / "gone"}))
    assert f"{option} is not a folder" in "\n".join(caught.value.lines())


def test_names_in_sub_folders_and_other_endings(workshop: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        put(tmp_path / "pictures", name)
        (tmp_path / "pictures" / name).mkdir()
        put(tmp_path / "pictures" / name, "same")
    for name in ("one", "two", "one/same", "two/same"):
        path = tmp_path / "masks" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (128, 96), 255 if name == "one/same" else 0).save(path)
    data = workshop.prepare(workshop.config(tmp_path / "pictures", recursive=True, mask_dir=tmp_path / "masks"))
    assert {batch.keys[0]: batch.mask.max().item() for batch in batches(data)} == {
        "one.png": 0,
        "one/same.png": 1,
        "two.png": 0,
        "two/same.png": 0,
    }


def test_a_mask_that_cannot_be_read_leaves_its_picture_out(workshop: Any, pictures: Path, tmp_path: Path) -> None:
    folder = masks(tmp_path / "masks", pictures)
    data = workshop.prepare(workshop.config(pictures, mask_dir=folder), cache=OFF)
    (folder / "1.png").write_bytes(b"gone bad")
    with pytest.raises(DataError, match=r"1\.png"):
        batches(data)
    assert any("masks/1.png" in line for line in workshop.warnings)
    with pytest.raises(DataError, match="1 of 4 pictures cannot be used"):
        workshop.prepare(workshop.config(pictures, mask_dir=folder))
    assert workshop.prepare(workshop.config(pictures, mask_dir=folder, max_skipped=0.5)).num_pictures == 3


def test_without_any_transparency_the_option_is_no_effect_and_says_so(workshop: Any, pictures: Path) -> None:
    data = workshop.prepare(workshop.config(pictures, alpha_mask=True))
    assert any("alpha_mask changes nothing" in line for line in workshop.warnings)
    assert all(batch.mask.min() == 1 for batch in batches(data))


@pytest.mark.parametrize("cache", CACHES)
def test_condition_pictures_are_placed_and_mirrored_as_their_pictures(
    workshop: Any, pictures: Path, tmp_path: Path, cache: dict[str, Any]
) -> None:
    folder = masks(tmp_path / "edges", pictures)
    config = workshop.config(pictures, condition_dir=folder, flip=True, crop="random", repeats=4)
    data = workshop.prepare(config, cache=cache)
    for batch in batches(data):
        shown = batch.pixels if batch.latents is None else None
        if shown is not None:
            assert torch.allclose(batch.condition, shown, atol=1e-5)
        else:
            assert torch.allclose(torch.nn.functional.avg_pool2d(batch.condition, 8)[:, :1], batch.latents[:, :1], atol=1e-4)
        assert batch.mask is None
    assert data.report.datasets[0].conditions == 4
    assert all(batch.condition is None for batch in batches(workshop.prepare(workshop.config(pictures), cache=cache)))


def test_a_changed_condition_picture_is_other_data(workshop: Any, pictures: Path, tmp_path: Path) -> None:
    folder = masks(tmp_path / "edges", pictures)
    before = workshop.prepare(workshop.config(pictures, condition_dir=folder)).digest
    Image.new("RGB", (128, 96)).save(folder / "0.png")
    assert workshop.prepare(workshop.config(pictures, condition_dir=folder)).digest != before


def test_the_mask_of_a_placement_is_the_area_mean(workshop: Any, tmp_path: Path) -> None:
    """A border inside a latent counts by the part that is covered."""
    put(tmp_path / "pictures", "a", size=(64, 64))
    (tmp_path / "masks").mkdir()
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 20, 64))
    mask.save(tmp_path / "masks" / "a.png")
    data = workshop.prepare(workshop.config(tmp_path / "pictures", mask_dir=tmp_path / "masks"))
    assert data.sets[0].items[0].placement == Placement(Size(64, 64), Size(64, 64), 0, 0)
    assert batches(data)[0].mask[0, 0, 3].tolist() == [1.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
