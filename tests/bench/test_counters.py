"""The gate on a training step's cost: kernels, traffic, saved memory and FLOPs of the bench's small model, which repeat exactly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "counters.py"
GATES = {
    "plain": {"kernels": 1300, "non_matmul_mb": 450, "saved_mb": 53, "gflop": 13.3},
    "checkpointed": {"kernels": 1770, "non_matmul_mb": 575, "saved_mb": 4.5, "gflop": 18.0},
}


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, float]]:
    result = subprocess.run([sys.executable, str(SCRIPT), "--json"], capture_output=True, text=True, check=True, timeout=300)
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", [f"{way}/{counter}" for way, gate in GATES.items() for counter in gate])
def test_a_step_costs_no_more(counted: dict[str, dict[str, float]], name: str) -> None:
    way, _, counter = name.partition("/")
    assert counted[way][counter] <= GATES[way][counter]
    assert counted[way][counter] > 0.9 * GATES[way][counter], "lower the gate: it has become looser than the code"


def test_recomputation_stops_before_the_last_product(counted: dict[str, dict[str, float]]) -> None:
    """A full second forward would cost 6.4 GFLOP; the last product of each block is not computed again."""
    assert counted["checkpointed"]["gflop"] - counted["plain"]["gflop"] < 4.8
