"""The files of a tiny model with plain and with wider image tokens, and pictures."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run
import torch
from PIL import Image

from fluxsmith.io.safetensors import open_weights, save_weights

Draw = Callable[..., Image.Image]


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("plain-model"))


@pytest.fixture(scope="session")
def wide_model(plain_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The same model with a transformer that takes so many features a token."""
    made: dict[int, Path] = {}

    def make(features: int) -> Path:
        if features not in made:
            folder = tmp_path_factory.mktemp(f"wide-{features}") / "model"
            shutil.copytree(plain_model, folder)
            with open_weights(plain_model / "dit.safetensors") as weights:
                tensors = {name: weights.tensor(name) for name in weights}
            generator = torch.Generator().manual_seed(features)
            tensors["img_in.weight"] = torch.randn(tiny_run.HIDDEN, features, generator=generator) * 0.1
            save_weights(folder / "dit.safetensors", tensors)
            made[features] = folder
        return made[features]

    return make


@pytest.fixture(scope="session")
def picture() -> Draw:
    """Random pixels: `picture(1, 64, 48)`."""

    def draw(seed: int, width: int = 64, height: int = 64) -> Image.Image:
        generator = torch.Generator().manual_seed(seed)
        return Image.fromarray(torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())

    return draw


@pytest.fixture(scope="session")
def mask() -> Draw:
    """White in a rectangle of (left, top, right, bottom): `mask((0, 0, 32, 64))`."""

    def draw(box: tuple[int, int, int, int], width: int = 64, height: int = 64) -> Image.Image:
        made = Image.new("RGB", (width, height))
        made.paste((255, 255, 255), box)
        return made

    return draw
