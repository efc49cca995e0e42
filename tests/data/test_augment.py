"""Changes of hue and gamma, and crops around a face: against their definitions, and drawn by the use alone."""

import colorsys
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fluxsmith.config.schema import ValidationConfig
from fluxsmith.data.augment import (
    GAMMA,
    HUE,
    Face,
    Tint,
    face_in_name,
    face_placement,
    name_without_face,
    random_tint,
    shifted_around,
    tinted,
)
from fluxsmith.data.buckets import BucketRule
from fluxsmith.data.types import Size
from fluxsmith.errors import ConfigError, DataError

pytestmark = pytest.mark.ledger("KS-42")
OFF = {"latents": "off", "text": "off"}


def test_a_third_of_the_uses_are_tinted_half_of_them_in_hue() -> None:
    draws = [random_tint(random.Random(seed)) for seed in range(6000)]
    hues, gammas = [tint.hue for tint in draws if tint.hue], [tint.gamma for tint in draws if tint.gamma != 1]
    assert (len(hues) + len(gammas)) / 6000 == pytest.approx(0.33, abs=0.02)
    assert len(hues) / (len(hues) + len(gammas)) == pytest.approx(0.5, abs=0.05)
    assert not [tint for tint in draws if tint.hue and tint.gamma != 1]
    assert (min(hues), max(hues)) == (pytest.approx(-HUE, abs=0.2), pytest.approx(HUE, abs=0.2))
    assert (min(gammas), max(gammas)) == (pytest.approx(GAMMA[0], abs=1e-3), pytest.approx(GAMMA[1], abs=1e-3))


@given(st.tuples(*[st.integers(0, 255)] * 3), st.floats(-180, 180))
def test_a_turned_hue_is_that_of_hsv(colour: tuple[int, int, int], degrees: float) -> None:
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
    expected = [channel * 255 for channel in colorsys.hsv_to_rgb((hue + degrees / 360) % 1, saturation, value)]
    found = np.asarray(tinted(Image.new("RGB", (2, 2), colour), Tint(hue=degrees)))[0, 0]
    assert np.abs(found - np.array(expected)).max() <= 0.51


def test_gamma_is_an_exponent_and_nothing_changes_nothing() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8))
    expected = np.rint((np.asarray(image) / 255.0) ** 1.05 * 255)
    assert np.abs(np.asarray(tinted(image, Tint(gamma=1.05))) - expected).max() <= 1
    assert tinted(image, Tint()) is image


def test_color_aug_changes_a_third_of_the_uses_and_needs_uncached_latents(workshop: Any, make_folder: Any, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "one", 1)
    with pytest.raises(ConfigError, match=r'color_aug.*cache.latents = "off"'):
        workshop.prepare(workshop.config(folder, color_aug=True))
    config = workshop.config(folder, color_aug=True, repeats=300)
    plain = workshop.prepare(workshop.config(folder), cache=OFF)
    still = plain.load(plain.batches(0)[0], step=0).pixels
    data = workshop.prepare(config, cache=OFF)
    pixels = [data.load(spec, step=0).pixels for spec in data.batches(0)]
    changed = [one for one in pixels if not torch.equal(one, still)]
    assert 70 < len(changed) < 130
    assert max((one - still).abs().max().item() for one in changed) < 0.7, "slightly"
    again = workshop.prepare(config, cache=OFF)
    assert torch.equal(again.load(again.batches(0)[200], step=0).pixels, pixels[200])


def test_faces_in_names() -> None:
    assert face_in_name("some_cat_10_20_30_40") == Face(10, 20, 30, 40)
    assert name_without_face("some_cat_10_20_30_40") == "some_cat"
    for name in ("cat", "10_20_30_40", "cat_10_20_30", "cat_a_20_30_40", "cat_10_20_0_40"):
        assert face_in_name(name) is None
    assert name_without_face("cat_a_b_c_d") is None


sides = st.integers(80, 2000)


@given(sides, sides, st.data())
def test_a_face_crop_lies_in_the_picture_with_the_face_as_large_as_asked(width: int, height: int, data: st.DataObject) -> None:
    face = Face(data.draw(st.integers(0, width)), data.draw(st.integers(0, height)), data.draw(st.integers(8, 300)), 20)
    size, bucket = Size(width, height), Size(64, 48)
    factors = (1.5, 4.0)
    placement = face_placement(size, face, bucket, factors=factors, rng=random.Random(data.draw(st.integers(0, 9))))
    for place in (placement, shifted_around(placement, face, size, random.Random(1))):
        assert 0 <= place.x <= place.resized.width - 64
        assert 0 <= place.y <= place.resized.height - 48
    scale, covering = placement.resized.width / width, max(64 / width, 48 / height)
    assert scale <= max(1, covering) + 1 / width, "never enlarged for the face"
    share = 48 / (max(face.width, face.height) * scale)
    is_limited = scale <= covering + 1 / width or scale >= 1 - 1 / width
    assert is_limited or factors[0] * 0.98 <= share <= factors[1] * 1.02
    middle = (face.x * placement.resized.width / width - placement.x, face.y * placement.resized.height / height - placement.y)
    is_free = [0 < placement.x < placement.resized.width - 64, 0 < placement.y < placement.resized.height - 48]
    assert not is_free[0] or abs(middle[0] - 32) <= 1
    assert not is_free[1] or abs(middle[1] - 24) <= 1


def test_a_shifted_crop_keeps_the_whole_face() -> None:
    size, face = Size(400, 300), Face(200, 150, 40, 30)
    placement = face_placement(size, face, Size(96, 96), factors=(2.0, 2.0), rng=None)
    moved = [shifted_around(placement, face, size, random.Random(seed)) for seed in range(200)]
    assert len({(one.x, one.y) for one in moved}) > 100
    for one in moved:
        across, down = one.resized.width / 400, one.resized.height / 300
        assert one.x <= 180 * across <= 220 * across <= one.x + 96
        assert one.y <= 135 * down <= 165 * down <= one.y + 96


@pytest.fixture
def faces(tmp_path: Path, picture: Callable[..., Path]) -> Path:
    for number, place in enumerate(["100_60_40_40", "250_150_50_30", "20_20_60_60"]):
        picture(tmp_path / "faces" / f"p{number}_{place}.png", (300, 200), seed=number)
        (tmp_path / "faces" / f"p{number}.txt").write_text(f"face {number}")
    return tmp_path / "faces"


def face_config(workshop: Any, folder: Path, **options: Any) -> Any:
    return workshop.config(folder, **({"face_crop": (1.0, 3.0), "buckets": {"enabled": False}} | options))


def test_face_crops_differ_from_use_to_use_and_once_a_picture_when_cached(workshop: Any, faces: Path) -> None:
    data = workshop.prepare(face_config(workshop, faces, repeats=8), cache=OFF)
    seen: dict[str, set[bytes]] = {}
    for spec in data.batches(0):
        batch = data.load(spec, step=0)
        assert batch.pixels.shape == (1, 3, 64, 64)
        assert batch.captions == (f"face {batch.keys[0][1]}",), "a name with a face shares the caption of the name"
        seen.setdefault(batch.keys[0], set()).add(batch.pixels.numpy().tobytes())
    assert min(map(len, seen.values())) >= 6
    cached = workshop.prepare(face_config(workshop, faces, repeats=8))
    assert workshop.encoders.pictures == 3
    latents = {cached.load(spec, step=0).latents.numpy().tobytes() for spec in cached.batches(0)}
    assert len(latents) == 3
    middle = workshop.prepare(workshop.config(faces, buckets={"enabled": False}))
    assert latents.isdisjoint(middle.load(spec, step=0).latents.numpy().tobytes() for spec in middle.batches(0))


@pytest.mark.parametrize("options", [{}, {"crop": "random"}], ids=["face", "face and random"])
@pytest.mark.parametrize("cache", [{}, OFF], ids=["cached", "live"])
def test_held_out_faces_are_measured_the_same_every_time(workshop: Any, faces: Path, options: Any, cache: Any) -> None:
    def measured(seed: int) -> list[torch.Tensor]:
        data = workshop.prepare(face_config(workshop, faces, **options), cache=cache, seed=seed)
        batches = [data.hold_out(ValidationConfig(share=0.4)) for _ in range(2)]
        loaded = [one.load(spec, step=0) for one in batches for spec in one.validation_batches()]
        assert len(loaded) == 2
        return [batch.pixels if batch.latents is None else batch.latents for batch in loaded]

    first, second = measured(1), measured(2)
    assert all(torch.equal(first[0], other) for other in (*first, *second)), "the run's seed draws nothing here"


def test_a_picture_without_a_face_in_its_name_is_refused(workshop: Any, faces: Path, picture: Callable[..., Path]) -> None:
    picture(faces / "plain.png")
    (faces / "plain.txt").write_text("x")
    with pytest.raises(DataError) as caught:
        workshop.prepare(face_config(workshop, faces))
    assert any("plain.png" in line and "NAME_cx_cy_w_h" in line for line in caught.value.lines())


def test_face_crop_needs_one_size(workshop: Any, faces: Path) -> None:
    with pytest.raises(ConfigError, match="one size"):
        workshop.prepare(workshop.config(faces, face_crop=(1.0, 2.0)))


@pytest.mark.ledger("KS-38")
def test_without_buckets_pictures_of_any_size_fill_the_resolution(workshop: Any, make_folder: Any, tmp_path: Path) -> None:
    """sd-scripts asks for the exact size here unless latents are cached."""
    folder = make_folder(tmp_path / "any", 4, sizes=[(64, 64), (300, 90), (40, 200), (30, 20)])
    for cache in ({}, OFF):
        data = workshop.prepare(workshop.config(folder, resolution=(64, 48), batch_size=4, buckets={"enabled": False}), cache=cache)
        (spec,) = data.batches(0)
        batch = data.load(spec, step=0)
        assert (batch.latents if batch.pixels is None else batch.pixels).shape[2:] == ((6, 8) if batch.pixels is None else (48, 64))
    assert BucketRule(Size(64, 48), enabled=False).place(Size(30, 20)) is not None
