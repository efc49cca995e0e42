"""Runs on a quantised base: the loss is nearly the plain one's and falls, resumed runs give the same bits, text states stay apart."""

from pathlib import Path
from typing import Any

import pytest
import tiny_run
from ran import Go, same

from fluxsmith.errors import ConfigError
from fluxsmith.events import PhaseStarted

LORA = {**tiny_run.LORA, "adapter.targets": "all"}
NEAR = {"fp8": 0.05, "int8": 0.05, "int4": 0.1, "nf4": 0.1, "int2": 0.3}


@pytest.mark.ledger("KS-21")
@pytest.mark.ledger("ST-05")
@pytest.mark.parametrize("kind", NEAR)
def test_a_lora_on_a_quantised_base(go: Go, kind: str) -> None:
    ran, plain = go({**LORA, "quant": {"type": kind}}, kind), go(LORA, "plain")
    assert ran.error is None
    assert not same(ran.weights, plain.weights)
    losses, others = ([float.fromhex(loss) for loss in one.losses] for one in (ran, plain))
    assert losses == pytest.approx(others, rel=NEAR[kind])
    assert [event.detail for event in ran.of(PhaseStarted) if event.name == "quantise" and kind in event.detail]


@pytest.mark.parametrize("options", [{"type": "nf4"}, {"type": "int8", "compute": "dynamic"}], ids=["nf4", "int8-dynamic"])
def test_training_lowers_the_loss(go: Go, options: dict[str, Any]) -> None:
    ran = go({**LORA, "quant": options, "train.steps": 40, "optim.lr": 2e-2, "adapter.rank": 8}, "long")
    losses = [float.fromhex(loss) for loss in ran.losses]
    assert sum(losses[-8:]) < 0.97 * sum(losses[:8])


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_a_resumed_run_gives_the_same_bits(go: Go, kind: str) -> None:
    changes = {
        **LORA,
        "quant": {"type": kind, "compute": "dynamic"} if kind == "int8" else {"type": kind},
        "checkpoint.every": 2,
        "schedule.name": "constant",
    }
    whole = go(changes, "whole")
    go({**changes, "train.steps": 2}, "cut")
    resumed = go(changes, "cut", resume=True, allow=["train.steps"])
    assert resumed.error is None
    assert same(resumed.weights, whole.weights)
    assert resumed.losses == whole.losses


def test_recomputed_blocks_give_the_same_loss(go: Go) -> None:
    changes = {**LORA, "quant": {"type": "int8"}, "memory.checkpointing": True}
    assert go(changes, "recomputed").losses == go({**changes, "memory.checkpointing": False}, "kept").losses


@pytest.mark.ledger("KS-20")
def test_text_encoders_in_fp8_change_the_cached_states(go: Go, tiny_model: Path) -> None:
    one = go({**LORA, "quant": {"type": "fp8"}, "cache.dir": str(tiny_model / "c1")}, "dit-only")
    both = go({**LORA, "quant": {"type": "fp8", "text_encoders": True}, "cache.dir": str(tiny_model / "c1")}, "both")
    apart = go({**LORA, "quant": {"type": "fp8", "text_encoders": "int4"}, "cache.dir": str(tiny_model / "c1")}, "apart")
    assert both.error is None
    assert len({tuple(ran.losses) for ran in (one, both, apart)}) == 3  # none is served from the cache of other encoders


@pytest.mark.ledger("ST-05")
def test_only_the_text_encoders(go: Go, tiny_model: Path) -> None:
    changes = {"cache.dir": str(tiny_model / "c2")}
    plain, ran = go({**LORA, **changes}, "plain"), go({**LORA, "quant": {"type": "none", "text_encoders": "int8"}, **changes}, "text")
    assert ran.error is None
    assert ran.losses != plain.losses
    assert go({"quant": {"type": "none", "text_encoders": "int8"}, **changes, "train.components": ["dit"]}, "full").error is None


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_a_quantised_base_cannot_be_trained_itself(go: Go, kind: str) -> None:
    with pytest.raises(ConfigError, match="cannot be trained itself"):
        go({"quant": {"type": kind}})
