"""The attention kernel of a run: another one gives nearly the same losses, an impossible one is refused before anything is read."""

import pytest
import tiny_run
from ran import Go

from fluxsmith.errors import ConfigError
from fluxsmith.events import PhaseStarted


@pytest.mark.ledger("KS-11")
def test_another_kernel(go: Go) -> None:
    plain, other = go(tiny_run.LORA, "plain"), go({**tiny_run.LORA, "memory.attention": "math"}, "math")
    one, two = ([float.fromhex(loss) for loss in ran.losses] for ran in (plain, other))
    assert one == pytest.approx(two, rel=1e-4)
    assert one != two


def test_fused_kernels_need_a_card(go: Go) -> None:
    ran = go({**tiny_run.LORA, "memory.kernels": "triton", "train.device": "cpu"})
    assert isinstance(ran.error, ConfigError)
    assert "needs a CUDA device" in str(ran.error)
    with pytest.raises(ConfigError, match="exclude each other"):
        go({"memory.kernels": "triton", "memory.reference_rounding": True})


@pytest.mark.ledger("ST-30")
def test_a_kernel_that_cannot_train(go: Go) -> None:
    ran = go({**tiny_run.LORA, "memory.attention": "sage", "train.device": "cpu"})
    assert isinstance(ran.error, ConfigError)
    assert "CUDA device" in str(ran.error)
    assert len(ran.of(PhaseStarted)) == 1  # only headers were read
