"""Blends are weighted sums."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import diffusers_folder, metadata_of, tensors_of

from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.io.safetensors import save_weights
from fluxsmith.tools.blend import BlendRequest, blend


@pytest.fixture
def other(base: Path, tmp_path: Path) -> Path:
    save_weights(tmp_path / "other.safetensors", {name: value + 1 for name, value in tensors_of(base).items()}, {})
    return tmp_path / "other.safetensors"


def run(target: Path, *models: tuple[Path, float], **options: Any) -> dict[str, Any]:
    return blend(BlendRequest(models, target, **options))


def test_shares(base: Path, other: Path, tmp_path: Path) -> None:
    """Also from a folder of diffusers."""
    report = run(tmp_path / "out.safetensors", (base, 0.25), (diffusers_folder(other, tmp_path / "folder"), 0.75))
    for name, value in tensors_of(tmp_path / "out.safetensors").items():
        assert torch.allclose(value, tensors_of(base)[name] + 0.75, atol=1e-6)
    assert report["in_some_only"] == []
    assert metadata_of(tmp_path / "out.safetensors")["modelspec.merged_from"] == "weights.safetensors x 0.25 + folder x 0.75"


def test_types(base: Path, other: Path, tmp_path: Path) -> None:
    run(tmp_path / "out.safetensors", (base, 0.5), (other, 0.5), dtype="bf16")
    assert {value.dtype for value in tensors_of(tmp_path / "out.safetensors").values()} == {torch.bfloat16}


def test_a_tensor_that_only_some_have(base: Path, other: Path, tmp_path: Path) -> None:
    """Without guidance embedder (schnell's structure): the mean of those that have it."""
    plain = {name: value for name, value in tensors_of(other).items() if not name.startswith("guidance_in")}
    save_weights(other, plain, {})
    report = run(tmp_path / "out.safetensors", (base, 0.25), (other, 0.75))
    made = tensors_of(tmp_path / "out.safetensors")
    assert len(report["in_some_only"]) == 4
    assert torch.allclose(made["guidance_in.in_layer.weight"], tensors_of(base)["guidance_in.in_layer.weight"])


def test_mistakes(base: Path, other: Path, fixtures_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(ConfigError, match="two or more"):
        run(out, (base, 1.0))
    with pytest.raises(ModelFileError, match="built differently"):
        run(out, (base, 0.5), (fixtures_root / "flux-dev-small/weights.safetensors", 0.5))
    with pytest.raises(ModelFileError, match="built differently|different families"):
        run(out, (base, 0.5), (fixtures_root / "chroma-tiny/weights.safetensors", 0.5))
    with pytest.raises(ConfigError, match="--overwrite"):
        run(other, (base, 0.5), (other, 0.5))
    assert not out.exists()
