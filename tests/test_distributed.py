"""Two processes train what one does with twice the accumulation: under accelerate, and with a stop in between."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from group import environment, free_port, torchrun
from ran import Ran, furthest

from fluxsmith.config.dump import to_toml
from fluxsmith.errors import ConfigError
from fluxsmith.events import Bus
from fluxsmith.train.run import train

TOLERANCE = 1e-6  # the sum of gradients has another order

pytestmark = [pytest.mark.timeout(600), pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")]


def accelerate(folder: Path) -> list[str]:
    """With a config as `accelerate config` writes it, which asks for FSDP."""
    config = folder / "fsdp.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nmixed_precision: 'no'\nnum_machines: 1\nnum_processes: 2\n"
        "fsdp_config:\n  fsdp_version: 2\n  fsdp_reshard_after_forward: true\n  fsdp_state_dict_type: SHARDED_STATE_DICT\n"
        f"main_process_port: {free_port()}\n"
    )
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "-m", "fluxsmith"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.prepare_files(tmp_path_factory.mktemp("tiny"))


def start(words: list[str], config: Path, *arguments: str) -> "subprocess.Popen[str]":
    words = [*words, "train", str(config), "--quiet", *arguments]
    return subprocess.Popen(words, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def write_config(model: Path, folder: Path, changes: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_run.config(model, folder / "run", {"train.steps": 5, "checkpoint.every": 0, "run.name": "w", **changes})
    path = folder / "run.toml"
    path.write_text(to_toml(config))
    return path


def alone(model: Path, folder: Path, changes: dict[str, Any], *, resume: bool = False) -> Ran:
    base = {"train.steps": 5, "checkpoint.every": 0, "run.name": "w"}
    train(tiny_run.config(model, folder / "run", {**base, **changes}), resume=resume, bus=Bus())
    return Ran(folder / "run")


def test_two_processes_equal_one_with_twice_the_accumulation(model: Path, tmp_path: Path) -> None:
    """Dropout included: its draws belong to the micro-batch and not to the process. The frozen base is sharded, as the launcher asks."""
    changes = {**tiny_run.LORA, "adapter.dropout": 0.3}
    one = alone(model, tmp_path / "one", {**changes, "train.accumulation": 4})
    process = start(accelerate(tmp_path), write_config(model, tmp_path / "two", {**changes, "train.accumulation": 2}))
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
    assert 'shard = "full"' in (two.folder / "run.toml").read_text()


def test_a_stop_reaches_both_and_the_run_goes_on(model: Path, tmp_path: Path) -> None:
    """The signal goes to one process only; both leave after the same step, with one state."""
    path = write_config(model, tmp_path, {"train.steps": 100_000, "schedule.name": "constant"})
    process, run = start([*torchrun(2), "-m", "fluxsmith"], path), Ran(tmp_path / "run")
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
    changes = {"train.steps": stopped + 2, "schedule.name": "constant"}
    with pytest.raises(ConfigError) as refused:  # half of the pictures in each step is another run
        alone(model, tmp_path, changes, resume=True)
    errors = " ".join(refused.value.lines())
    assert "facts.world_size was 2" in errors
    assert "write train.accumulation = 4 (a step has 4 micro-batches)" in errors
    alone(model, tmp_path, {**changes, "train.accumulation": 4}, resume=True)
    assert [row["step"] for row in run.rows] == list(range(1, stopped + 3))
