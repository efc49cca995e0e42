"""Condition pictures: canny is OpenCV's to the pixel, simple ones do what they say, learned ones come through the door."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxsmith.controls.annotators import DETECTORS, annotated
from fluxsmith.controls.edges import edges
from fluxsmith.controls.processors import NAMES, processed
from fluxsmith.errors import ConfigError

OPENCV = (  # cv2.Canny(picture, 100, 200) of OpenCV 5.0.0, as bits
    "041041041040041041041040041041041040041041041040041041041040fdef9ef9efbf040821020840041041041040041041041040041041041040041041041040"
    "fdefde7defbf040861840800041041041040041041041040041041041040041041041040ffe7bf7fefbf001800800860041041041040041041041040041041041040"
    "041041041040f9ffdf7fe7bf040040801000041041041040041041041040041041041040041041041040fbeffff9f7ff000821060020001041041040001041041040"
    "001041041040001041041040001041041040"
)


def blocks(seed: int = 7) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((48, 36), Image.Resampling.NEAREST)


@pytest.mark.ledger("DS-14")
def test_canny_is_opencvs_to_the_pixel() -> None:
    found = np.asarray(processed("canny", blocks()))
    assert set(np.unique(found)) == {0, 255}
    assert np.packbits(found[..., 0] > 0).tobytes().hex() == OPENCV


def test_weak_edges_count_where_they_hang_on_strong_ones() -> None:
    ramp = np.zeros((24, 24, 3), dtype=np.uint8)
    ramp[:, 12:] = np.linspace(10, 90, 24).astype(np.uint8)[:, None, None]  # a slope of 4 * 10 to 4 * 90
    image = Image.fromarray(ramp)
    strong, grown = (np.asarray(edges(image, low, 240))[..., 0] > 0 for low in (240, 100))
    assert 0 < strong.sum() < grown.sum()
    assert not (strong & ~grown).any()
    assert not np.asarray(edges(image, 400, 400)).any()


def test_simple_ones() -> None:
    image = blocks()
    for name in ("none", "tile", "inpaint"):
        assert processed(name, image).tobytes() == image.tobytes()
    grey = np.asarray(processed("grey", image))
    assert (grey == grey[..., :1]).all()
    for name in ("blur", "low_quality", "lq"):
        made = processed(name, image)
        assert made.size == image.size
        assert np.asarray(made, dtype=int).std() < np.asarray(image, dtype=int).std()


class Detector:
    """What a detector of controlnet_aux looks like."""

    def __init__(self, weights: str) -> None:
        self.calls: list[Any] = [weights]

    def to(self, device: Any) -> "Detector":
        self.calls.append(str(device))
        return self

    def __call__(self, image: Image.Image, **options: Any) -> Image.Image:
        self.calls.append(options)
        return Image.new("L", (64, 64), 77)


@pytest.mark.parametrize("name", [*DETECTORS, "pose"])
def test_learned_ones_come_through_the_door(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Detector] = []

    def from_pretrained(weights: str) -> Detector:
        made.append(Detector(weights))
        return made[-1]

    kind = DETECTORS["openpose" if name == "pose" else name]
    monkeypatch.setitem(sys.modules, "controlnet_aux", SimpleNamespace(**{kind: SimpleNamespace(from_pretrained=from_pretrained)}))
    result = processed(name, blocks(), weights="folder")
    assert (result.size, result.mode, result.getpixel((0, 0))) == ((48, 36), "RGB", (77, 77, 77))
    weights, device, options = made[0].calls
    assert (weights, device, options["detect_resolution"]) == ("folder", "cpu", 36)
    assert options.get("include_hand", False) is (kind == "OpenposeDetector")


def test_without_the_package_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    with pytest.raises(ConfigError, match="depth needs controlnet_aux.*pip install controlnet_aux"):
        annotated("depth", blocks())


def test_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match="no processor is called sketch.*canny"):
        processed("sketch", blocks())
    assert {"none", "tile", "blur", "gray", "low_quality", "inpaint", "canny", "depth", "softedge", "normal"} <= set(NAMES)
