"""Adapters merged into the base before training: the run starts where the merged model is."""

from pathlib import Path

import pytest
import tiny_run
from ran import Go

LORA = {**tiny_run.LORA, "adapter.targets": "attention", "train.accumulation": 1}


@pytest.fixture
def trained(go: Go) -> Path:
    ran = go({**LORA, "optim.lr": 0.1, "checkpoint.dtype": "fp32"}, "first")
    assert ran.error is None
    return ran.folder / "weights" / "w.safetensors"


@pytest.mark.ledger("KS-51")
def test_strength_counts_and_zero_is_nothing(go: Go, trained: Path) -> None:
    plain = go(LORA, "plain")
    losses = {s: go({**LORA, "base_adapters": [{"path": str(trained), "strength": s}]}, f"s{s}").losses for s in (0.0, 0.5, 1.0)}
    assert losses[0.0] == plain.losses
    assert len({losses[s][0] for s in losses}) == 3


@pytest.mark.ledger("KS-51")
def test_the_merged_base_starts_with_the_loss_of_the_attached_one(go: Go, trained: Path) -> None:
    merged = go({**LORA, "base_adapters": [{"path": str(trained)}]}, "merged")
    attached = go({**LORA, "adapter.init_from": str(trained)}, "attached")
    first = [float.fromhex(one.losses[0]) for one in (merged, attached)]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
