"""The tiny model as a pipeline, LoRA files for it, and a starting picture."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fluxsmith.adapters.formats.files import write_adapter
from fluxsmith.adapters.lora import Config
from fluxsmith.config.load import load_model
from fluxsmith.generate.pipeline import Pipeline

MakeLora = Callable[..., Path]


@pytest.fixture(scope="session")
def loaded(tiny_section: dict[str, str]) -> Pipeline:
    return Pipeline.load(load_model({"model": tiny_section}), device="cpu")


@pytest.fixture
def pipeline(loaded: Pipeline) -> Iterator[Pipeline]:
    """Loaded once; what a test attaches is taken off again."""
    yield loaded
    loaded.clear_loras()


@pytest.fixture(scope="session")
def make_lora(loaded: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> MakeLora:
    """Writes a LoRA with random factors for the tiny model: `make_lora("a", seed=1)`."""
    folder = tmp_path_factory.mktemp("loras")

    def make(name: str, *, seed: int, size: float = 0.1, **options: Any) -> Path:
        adapters = Config.model_validate({"type": "lora", "rank": 2, **options}).build(loaded.models.loaded(), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        values = {key: torch.randn(param.shape, generator=generator) * size for key, param in adapters.params.items()}
        path = folder / f"{name}.safetensors"
        write_adapter(path, adapters.state(values), dtype=torch.float32)
        adapters.detach()
        return path

    return make


@pytest.fixture(scope="session")
def start() -> Image.Image:
    """A picture of two colours."""
    image = Image.new("RGB", (64, 32), (200, 30, 30))
    image.paste((30, 30, 200), (16, 8, 48, 24))
    return image
