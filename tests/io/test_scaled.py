"""Weights in 8 bits with scales are read as what they stand for; forms that are not known stay refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fluxsmith.io.identify import identify
from fluxsmith.io.safetensors import save_weights
from fluxsmith.io.scaled import open_scaled

FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(12, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 0, 12)[:, None]


@pytest.mark.parametrize(
    ("name", "blocks"), [("scale_weight", 0), ("weight_scale", 0), ("scale_weight", 1), ("scale_weight", 2), ("scale_weight", -1)]
)
def test_scales_are_applied(weight: Tensor, tmp_path: Path, name: str, blocks: int) -> None:
    """One for the tensor, one for each row (two shapes), or for blocks of a row's inputs."""
    if blocks < 1:
        scale = weight.abs().amax(1 if blocks else None, keepdim=bool(blocks)).reshape(-1) / 448
        stored = (weight / scale.view(-1, 1)).to(FP8)
        expected = stored.float() * scale.view(-1, 1)
    else:
        cut = weight.view(12, blocks, -1)
        scale = cut.abs().amax(2, keepdim=True) / 448
        stored = (cut / scale).to(FP8).view(12, 8)
        expected = (stored.view(12, blocks, -1).float() * scale).view(12, 8)
    tensors = {
        "a.weight": stored,
        f"a.{name}": scale,
        "a.bias": torch.ones(12),
        "scaled_fp8": torch.zeros(2, dtype=FP8),
        "a.scale_input": torch.ones(1),
    }
    save_weights(tmp_path / "x.safetensors", tensors, {})
    with open_scaled(tmp_path / "x.safetensors") as weights:
        assert set(weights) == {"a.weight", "a.bias"}
        assert weights.infos["a.weight"].dtype == "F32"
        assert torch.equal(weights.tensor("a.weight"), expected)
        assert weights.tensor("a.weight", dtype=torch.bfloat16).dtype == torch.bfloat16
        assert float((weights.tensor("a.weight") - weight).abs().max()) < 0.1


def test_a_scaled_transformer_is_identified(fixtures_root: Path, tmp_path: Path) -> None:
    with open_scaled(fixtures_root / "flux-dev-tiny/weights.safetensors") as weights:
        tensors = {name: weights.tensor(name) for name in weights}
        assert not weights.scaled
    key = "img_in.weight"
    tensors |= {key: (tensors[key] / 2).to(FP8), "img_in.scale_weight": torch.tensor([2.0])}
    save_weights(tmp_path / "x.safetensors", tensors, {})
    found = identify(tmp_path / "x.safetensors")
    assert found.unusable == ()
    assert found.notes[-1] == "1 weights are stored in 8 bits with scales"
    with open_scaled(tmp_path / "x.safetensors") as weights:
        assert identify(weights).unusable == ()


@pytest.mark.parametrize("scale", [torch.ones(5), torch.ones(12, 3, 1), torch.ones(12, dtype=torch.int32)])
def test_other_forms_are_left_alone(weight: Tensor, tmp_path: Path, scale: Tensor) -> None:
    save_weights(tmp_path / "x.safetensors", {"a.weight": weight.to(FP8), "a.weight_scale": scale}, {})
    with open_scaled(tmp_path / "x.safetensors") as weights:
        assert set(weights) == {"a.weight", "a.weight_scale"}
