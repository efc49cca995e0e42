"""The door to the face packages: sizes tried in turn, the largest face, its crop and its vector, and what is said without them."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fluxsmith.controls import faces
from fluxsmith.controls.faces import face_vector
from fluxsmith.errors import ConfigError, DataError


class Analysis:
    """A detector that finds two faces at one size."""

    found_at = 320
    made: list["Analysis"] = []

    def __init__(self, **options: Any) -> None:
        self.options, self.sides = options, list[int]()
        self.made.append(self)

    def prepare(self, *, ctx_id: int, det_size: tuple[int, int]) -> None:
        self.sides.append(det_size[0])

    def get(self, bgr: Any) -> list[dict[str, Any]]:
        assert bgr[0, 0].tolist() == [3, 2, 1]
        small, large = {"bbox": (0, 0, 2, 2), "kps": [[0, 0]]}, {"bbox": (1, 1, 9, 5), "kps": [[1, 1]]}
        return [large, small] if self.sides[-1] == self.found_at else []


def norm_crop(bgr: Any, *, landmark: Any, image_size: int) -> Any:
    assert landmark.tolist() == [[1, 1]]
    return np.full((image_size, image_size, 3), 255, dtype=np.uint8)


def arcface(name: str, *, device: str) -> Any:
    assert (name, device) == ("arcface", "cpu")
    return lambda crop: torch.full((1, 512), float(crop.mean())) + crop.shape[-1]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins = {
        "insightface.app": {"FaceAnalysis": Analysis},
        "insightface.utils.face_align": {"norm_crop": norm_crop},
        "facexlib.recognition": {"init_recognition_model": arcface},
        "onnxruntime": {"get_available_providers": lambda: ["CPU"]},
    }
    for name, contents in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(faces, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(Analysis, "made", [])


@pytest.mark.ledger("DS-16")
def test_sizes_are_tried_in_turn_and_the_largest_face_is_taken(packages: None) -> None:
    vector = face_vector(Image.new("RGB", (40, 30), (1, 2, 3)), folder="models")
    assert (vector.shape, vector[0].item()) == ((512,), 1.0 + 112)
    (detector,) = Analysis.made
    assert detector.sides == [640, 320]
    assert (detector.options["name"], detector.options["root"], detector.options["allowed_modules"]) == (
        "antelopev2",
        "models",
        ["detection"],
    )


def test_a_picture_without_a_face(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Analysis, "found_at", 0)
    with pytest.raises(DataError, match="no face is found"):
        face_vector(Image.new("RGB", (40, 30), (1, 2, 3)), folder="models")
    assert Analysis.made[0].sides == [640, 320, 160]


def test_without_the_packages_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces, "find_spec", lambda name: None if name == "facexlib" else SimpleNamespace())
    with pytest.raises(ConfigError, match="needs facexlib.*pip install insightface onnxruntime facexlib"):
        face_vector(Image.new("RGB", (4, 4)), folder="models")
