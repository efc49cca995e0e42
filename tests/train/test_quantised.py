"""Runs on a quantised base: the loss is nearly the plain one's, text states of other encoders are not reused."""

from pathlib import Path

import pytest
import tiny_run
from ran import Go, same

from fluxsmith.errors import ConfigError

LORA = {**tiny_run.LORA, "adapter.targets": "all"}


@pytest.mark.ledger("KS-21")
def test_a_lora_on_an_fp8_base(go: Go) -> None:
    quantised = {**LORA, "quant": {"type": "fp8"}}
    ran, plain = go(quantised, "fp8"), go(LORA, "plain")
    assert ran.error is None
    assert not same(ran.weights, plain.weights)
    losses, others = ([float.fromhex(loss) for loss in one.losses] for one in (ran, plain))
    assert losses == pytest.approx(others, rel=0.05)


@pytest.mark.ledger("KS-20")
def test_text_encoders_in_fp8_change_the_cached_states(go: Go, tiny_model: Path) -> None:
    one = go({**LORA, "quant": {"type": "fp8"}, "cache.dir": str(tiny_model / "c1")}, "dit-only")
    both = go({**LORA, "quant": {"type": "fp8", "text_encoders": True}, "cache.dir": str(tiny_model / "c1")}, "both")
    assert both.error is None
    assert one.losses != both.losses  # not served from the cache of the other encoders


def test_a_quantised_base_cannot_be_trained_itself(go: Go) -> None:
    with pytest.raises(ConfigError, match="cannot be trained itself"):
        go({"quant": {"type": "fp8"}})
