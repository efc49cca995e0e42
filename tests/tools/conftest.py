"""The tiny base, the fixtures' LoRAs for it, and further ones with random factors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lora_files import write_lora


@pytest.fixture(scope="session")
def base(fixtures_root: Path) -> Path:
    return fixtures_root / "flux-dev-tiny/weights.safetensors"


@pytest.fixture(scope="session")
def lora_file(fixtures_root: Path) -> Callable[[str], Path]:
    return lambda name: fixtures_root / f"flux-dev-lora-tiny/{name}.safetensors"


@pytest.fixture
def make_lora(tmp_path: Path, base: Path) -> Callable[..., Path]:
    """`make_lora("a", seed=1, rank=3, alpha=2.0)`: see lora_files.write_lora."""

    def make(name: str, **options: Any) -> Path:
        return write_lora(tmp_path / f"{name}.safetensors", base, **options)

    return make
