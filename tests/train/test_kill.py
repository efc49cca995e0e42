"""SIGKILL of the real command at four random moments; `bench/kill_test.py` does the same a hundred times."""

import importlib.util
from pathlib import Path

import pytest
import tiny_run
from exact_resume import KINDS, result_of

from fluxsmith.events import Bus
from fluxsmith.train.run import train

BENCH = Path(__file__).resolve().parents[2] / "bench" / "kill_test.py"


@pytest.mark.ledger("FS-05")
@pytest.mark.timeout(600)
def test_killed_commands_end_in_the_same_bits(tiny_model: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("kill_test", BENCH)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    straight = tiny_run.config(tiny_model, tmp_path / "straight" / "run", {**KINDS["lora"], **bench.LENGTH, "run.name": "w"})
    train(straight, bus=Bus())
    trial = bench.Trial(tiny_model, tmp_path / "killed", "lora", 1)
    trial.finish(starts=5)
    assert trial.failure == ""
    assert trial.places.total() >= 2
    assert result_of(trial.run_dir) == result_of(straight.run.dir)
