"""Two processes train what one does with twice the accumulation: under torchrun, under accelerate, and with a stop in between."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from ran import Ran, furthest

from fluxsmith.config.dump import to_toml
from fluxsmith.events import Bus
from fluxsmith.train.run import train

SOURCE = Path(__file__).resolve().parents[1] / "src"
TOLERANCE = 1e-6  # the sum of gradients has another order

pytestmark = [pytest.mark.timeout(600), pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun() -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "fluxsmith"]


def accelerate() -> list[str]:
    words = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [
        sys.executable, "-m", "accelerate.commands.launch", *words, "--main_process_port", str(free_port()), "-m", "fluxsmith",
    ]  # fmt: skip


LAUNCHERS: dict[str, Callable[[], list[str]]] = {"torchrun": torchrun, "accelerate": accelerate}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.prepare_files(tmp_path_factory.mktemp("tiny"))


def start(words: list[str], config: Path, *arguments: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    words = [*words, "train", str(config), "--quiet", *arguments]
    return subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def write_config(model: Path, folder: Path, changes: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_run.config(model, folder / "run", {"train.steps": 5, "checkpoint.every": 0, "run.name": "w", **changes})
    path = folder / "run.toml"
    path.write_text(to_toml(config))
    return path


def alone(model: Path, folder: Path, changes: dict[str, Any]) -> Ran:
    base = {"train.steps": 5, "checkpoint.every": 0, "run.name": "w"}
    train(tiny_run.config(model, folder / "run", {**base, **changes}), bus=Bus())
    return Ran(folder / "run")


@pytest.mark.parametrize(
    ("launcher", "changes"),
    [
        ("torchrun", {}),
        ("accelerate", {**tiny_run.LORA, "adapter.dropout": 0.3}),
    ],
)
def test_two_processes_equal_one_with_twice_the_accumulation(model: Path, tmp_path: Path, launcher: str, changes: dict[str, Any]) -> None:
    """Dropout included: its draws belong to the micro-batch and not to the process."""
    one = alone(model, tmp_path / "one", {**changes, "train.accumulation": 4})
    process = start(LAUNCHERS[launcher](), write_config(model, tmp_path / "two", {**changes, "train.accumulation": 2}))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    two = Ran(tmp_path / "two" / "run")
    assert two.states == [5]
    assert furthest(one.weights, two.weights) < TOLERANCE
    assert furthest(one.tensors(5, "ema"), two.tensors(5, "ema")) < TOLERANCE
    assert [row["step"] for row in two.rows] == [1, 2, 3, 4, 5], "one process writes"
    losses = [[float.fromhex(loss) for loss in ran.losses] for ran in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert [path.name for path in (two.folder / "weights").iterdir()] == ["w.safetensors"]
    state = json.loads((two.folder / "state" / "step-000005" / "state.json").read_text())
    assert state["identity"]["facts.world_size"] == 2


def test_a_stop_reaches_both_and_the_run_goes_on(model: Path, tmp_path: Path) -> None:
    """The signal goes to one process only; both leave after the same step, with one state."""
    path = write_config(model, tmp_path, {"train.steps": 100_000, "schedule.name": "constant"})
    process, run = start(torchrun(), path), Ran(tmp_path / "run")
    deadline = time.monotonic() + 200
    while len(run.rows) < 3:
        assert time.monotonic() < deadline, "the run does not get going"
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.1)
    os.kill(json.loads((run.folder / "run.lock").read_text())["pid"], signal.SIGTERM)
    _, errors = process.communicate(timeout=200)
    assert "stopped by SIGTERM" in errors
    (stopped,) = run.states
    assert len(run.rows) == stopped
    path = write_config(model, tmp_path, {"train.steps": stopped + 2, "schedule.name": "constant"})
    _, errors = (again := start(torchrun(), path, "--resume")).communicate(timeout=200)
    assert again.returncode == 0, errors[-3000:]
    assert [row["step"] for row in run.rows] == list(range(1, stopped + 3))
    refused = start([sys.executable, "-m", "fluxsmith"], path, "--resume")
    _, errors = refused.communicate(timeout=100)
    assert refused.returncode == 2, "one process alone is another run"
    assert "facts.world_size was 2" in errors
