"""Requests: everything wrong is named at once, and settings can be written down."""

import json
from typing import Any

import pytest
from PIL import Image

from fluxsmith.errors import ConfigError
from fluxsmith.generate.request import Request
from fluxsmith.models.tiling import Tiling

START = Image.new("RGB", (16, 16))


def problems(**settings: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Request("a cat", **settings).check()
    return [str(problem) for problem in caught.value.problems]


def test_all_problems_at_once() -> None:
    found = problems(
        width=100, height=0, steps=0, strength=2.0, guidance=-1.0, cfg=float("nan"), seed=-1, shift=0.0, sampler="ddim", tile=8, overlap=8
    )
    assert len(found) == 10  # tile and overlap are one finding
    assert all("Fix: " in line for line in found)
    for word in ("width = 100", "height = 0", "steps = 0", "strength", "guidance", "cfg", "seed", "shift", "ddim", "overlap = 8"):
        assert any(word in line for line in found), word


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strength": 0.5}, "strength without a starting picture"),
        ({"negative": "blue"}, "no effect while cfg is 1"),
        ({"width": 1025}, "use 1024"),
        ({"height": 8}, "use 16"),
        ({"seed": 2**63}, "seeds go from 0"),
        ({"shift": "big"}, "flux, none or a number"),
        ({"tile": 64, "overlap": -16}, "tiles must advance"),
    ],
)
def test_single_problems(settings: dict[str, Any], words: str) -> None:
    (line,) = problems(**settings)
    assert words in line


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"negative": "blue", "cfg": 3.5},
        {"image": START, "strength": 0.1},
        {"shift": 3, "sampler": "heun", "guidance": 0.0, "steps": 1},
        {"tile": 64, "overlap": 0},
    ],
)
def test_good_requests(settings: dict[str, Any]) -> None:
    Request("a cat", **settings).check()


@pytest.mark.ledger("DS-05")
def test_when_the_autoencoder_is_tiled() -> None:
    assert Request("a").tiling() is None
    assert Request("a", width=1536, height=1536).tiling() is None
    assert Request("a", width=2048, height=1536).tiling() == Tiling(1024, 256)
    assert Request("a", width=2048, height=1536, tile=0).tiling() is None
    assert Request("a", tile=512).tiling() == Tiling(512, 128)
    assert Request("a", tile=512, overlap=64).tiling() == Tiling(512, 64)


def test_settings_are_json_without_the_picture() -> None:
    settings = Request("ein Kätzchen", image=START, strength=0.4, shift=2.0).settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["image_to_image"] is True
    assert "image" not in settings
    assert Request(**{key: value for key, value in settings.items() if key != "image_to_image"}).settings() == {
        **settings,
        "image_to_image": False,
    }
