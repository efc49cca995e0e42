"""What adapters do between steps, in whole runs: GGPO's noise and its exact resume, the norm limit, rates of zero."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxsmith.adapters.formats.files import read_adapter
from fluxsmith.adapters.load import norm_of
from fluxsmith.config.load import load_config
from fluxsmith.train.run import train

Make = Callable[..., dict[str, Any]]
GGPO = {"adapter.ggpo_sigma": 0.3, "adapter.ggpo_beta": 0.01}


def weights(folder: Path, step: int) -> bytes:
    return (folder / f"state/step-{step:06d}/weights.safetensors").read_bytes()


@pytest.mark.ledger("KS-30")
@pytest.mark.parametrize("split", [False, True])
def test_ggpo_acts_from_the_second_step_and_resumes_exactly(tiny_run: Make, tmp_path: Path, split: bool) -> None:
    common = {"adapter.split_qkv": split, "checkpoint.every": 1, "checkpoint.keep": 9}
    common |= {"memory.reference_rounding": True}  # layers with noise are never multiplied in the lean way
    train(load_config(tiny_run(tmp_path / "plain", {**common, "train.steps": 3})).config)
    train(load_config(tiny_run(tmp_path / "straight", {**common, **GGPO, "train.steps": 4})).config)
    assert weights(tmp_path / "plain", 1) == weights(tmp_path / "straight", 1)
    assert weights(tmp_path / "plain", 2) != weights(tmp_path / "straight", 2)
    train(load_config(tiny_run(tmp_path / "cut", {**common, **GGPO, "train.steps": 2})).config)
    train(load_config(tiny_run(tmp_path / "cut", {**common, **GGPO, "train.steps": 4})).config, resume=True)
    assert weights(tmp_path / "cut", 4) == weights(tmp_path / "straight", 4)


def test_the_norm_limit_holds_in_the_saved_file(tiny_run: Make, tmp_path: Path) -> None:
    largest = {}
    for name, limit in (("free", None), ("limited", 1e-3)):
        changes = {"adapter.max_norm": limit, "optim.lr": 1e-2, "train.steps": 3, "checkpoint.dtype": "fp32"}
        train(load_config(tiny_run(tmp_path / name, changes)).config)
        layers = read_adapter(tmp_path / name / "weights" / f"{name}.safetensors").layers
        largest[name] = max(norm_of(layer) or 0 for layer in layers.values())
    assert largest["free"] > 2e-3
    assert largest["limited"] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.ledger("KS-37")
def test_a_rate_of_zero_saves_what_it_does_not_train(tiny_run: Make, tmp_path: Path) -> None:
    changes = {"adapter.lr_by_pattern": {"kohya:lora_unet_single": 0.0}, "train.steps": 2, "checkpoint.dtype": "fp32"}
    train(load_config(tiny_run(tmp_path / "run", changes)).config)
    layers = read_adapter(tmp_path / "run/weights/run.safetensors").layers
    assert {path for path, layer in layers.items() if not norm_of(layer)} == {path for path in layers if ".single_blocks." in path}
