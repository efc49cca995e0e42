"""Figures of weights, against torch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lora_files import tensors_of

from fluxsmith.io.safetensors import save_weights
from fluxsmith.tools.weights import weight_report


def test_factors_and_everything(make_lora: Callable[..., Path], tmp_path: Path) -> None:
    lora = make_lora("a", seed=1)
    tensors = tensors_of(lora)
    figures = {item.name: item for item in weight_report(lora)}
    assert figures.keys() == {name for name in tensors if not name.endswith("alpha")}
    for name, item in figures.items():
        values = tensors[name].abs()
        assert item.shape == tuple(values.shape)
        assert (item.mean, item.least, item.largest) == pytest.approx((float(values.mean()), float(values.min()), float(values.max())))
    assert {item.name for item in weight_report(lora, shows_all=True)} == set(tensors)


def test_any_file(base: Path, tmp_path: Path) -> None:
    assert len(list(weight_report(base, shows_all=True))) == len(tensors_of(base))
    assert list(weight_report(base)) == []
    save_weights(tmp_path / "x.safetensors", {"a": torch.empty(0), "b": torch.tensor([-2, 1]).to(torch.float8_e4m3fn)}, {})
    figures = {item.name: item for item in weight_report(tmp_path / "x.safetensors", shows_all=True)}
    assert (figures["b"].mean, figures["b"].least, figures["a"].mean) == (1.5, 1.0, 0.0)
