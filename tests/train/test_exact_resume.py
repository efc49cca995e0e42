"""A run that is cut anywhere and resumed ends in the same bits as one that was not: weights, moments, averages, rows, exported files.

The points are enumerated: at each one a forked process dies by `_exit`, another resumes. `--all-crash-points` takes every point
instead of an even sample.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import prepare_files

SUPPORT = Path(__file__).resolve().parent.parent / "support"
SOURCE = SUPPORT.parent.parent / "src"
POINTS, SHARES = 96, 2  # crash points a kind of training, in tests that run beside each other
STATES = 200  # after power cuts, both kinds together
NEEDED = {"create", "write", "half", "fsync", "fsync-folder", "rename", "mkdir", "remove-tree", "append"}

pytestmark = pytest.mark.timeout(900)  # a tenth of it on an idle machine

Job = Callable[..., dict[str, Any]]


@pytest.fixture
def job(tiny_model: Path, tmp_path: Path) -> Job:
    """Run tests/support/exact_resume.py in a process of its own: forking needs one without threads."""
    memory = Path("/dev/shm")
    root = memory / f"fluxsmith-{os.getpid()}-{tmp_path.name}" if memory.is_dir() and os.access(memory, os.W_OK) else tmp_path

    def run(**values: Any) -> dict[str, Any]:
        environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
        text = json.dumps({"root": str(root), "model": str(tiny_model), **values})
        done = subprocess.run([sys.executable, SUPPORT / "exact_resume.py", text], capture_output=True, text=True, env=environment)
        subprocess.run(["rm", "-rf", str(root)], check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return {**json.loads(done.stdout.splitlines()[-1]), "stderr": done.stderr}

    return run


@pytest.mark.ledger("FS-05")
@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_killed_at_any_point(job: Job, request: pytest.FixtureRequest, kind: str, share: int) -> None:
    everything = request.config.getoption("--all-crash-points")
    found = job(task="crash", kind=kind, count=0 if everything else POINTS, share=[share, SHARES])
    assert found["problems"] == {}, found["stderr"][-3000:]
    assert found["points"] >= (found["of"] if everything else POINTS) // SHARES
    assert found["resumed"] > found["points"] * 0.7  # the others died before the first state
    assert set(found["operations"]) >= NEEDED


@pytest.mark.ledger("FS-05")
def test_killed_again_and_again(job: Job) -> None:
    found = job(task="twice", kind="lora", count=8)
    assert found["problems"] == {}, found["stderr"][-3000:]
    assert found["deaths"] >= 8


@pytest.mark.ledger("FS-05")
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_power_cut_anywhere(job: Job, kind: str) -> None:
    found = job(task="power", kind=kind, count=STATES // 2)
    assert found["problems"] == {}, found["stderr"][-3000:]
    assert found["states"] == STATES // 2


def test_every_fault_is_seen(job: Job) -> None:
    """Checks that let a broken trainer pass would prove nothing."""
    found = job(task="faults", kind="lora")
    assert len(found["caught"]) >= 10
    assert [name for name, how in found["caught"].items() if not how] == [], found["stderr"][-3000:]


def test_other_captions_train_other_weights(tmp_path: Path, job: Job) -> None:
    """The check behind one of the faults, without the fault."""
    model = prepare_files(tmp_path / "model")
    assert job(task="captions", kind="lora", model=str(model))["problems"] == {}
