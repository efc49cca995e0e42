"""The tiny model in DiffSynth-Studio's folders, loaded once, and a picture."""

from collections.abc import Iterator
from pathlib import Path

import diffsynth_models
import diffsynth_tiny
import pytest
from PIL import Image

from fluxsmith.dialects.diffsynth import FluxImagePipeline


@pytest.fixture(scope="session")
def models_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffsynth_tiny.write_models(tmp_path_factory.mktemp("diffsynth"))


@pytest.fixture(scope="session")
def all_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffsynth_models.write_all(tmp_path_factory.mktemp("all"))


@pytest.fixture(scope="session")
def loaded(models_root: Path) -> FluxImagePipeline:
    return diffsynth_tiny.load(models_root)


@pytest.fixture
def pipe(loaded: FluxImagePipeline) -> Iterator[FluxImagePipeline]:
    """Loaded once; hot LoRAs are taken off again."""
    yield loaded
    loaded.clear_lora()


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """A picture of the size of SHORT."""
    image = Image.new("RGB", (48, 32), (200, 30, 30))
    image.paste((30, 30, 200), (8, 8, 24, 24))
    return image
