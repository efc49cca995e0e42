"""The lean step and the reference's roundings: nearly the same losses, not the same bits."""

import pytest
import tiny_run
from ran import Go

LORA = {**tiny_run.LORA, "adapter.targets": "all"}


@pytest.mark.parametrize("changes", [LORA, {}], ids=["lora", "full"])
def test_reference_rounding(go: Go, changes: tiny_run.Options) -> None:
    lean, reference = go(changes, "lean"), go({**changes, "memory.reference_rounding": True}, "reference")
    one, other = ([float.fromhex(loss) for loss in ran.losses] for ran in (lean, reference))
    assert one == pytest.approx(other, rel=1e-4)
    assert one != other
