"""Stopping: signals and the STOP file leave a state that the run continues from, the second signal leaves at once."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run
from ran import Go, same

from fluxsmith.config.dump import to_toml
from fluxsmith.events import CheckpointSaved, Event, RunEnded, StepEnded
from fluxsmith.train.stop import StopSwitch

SOURCE = Path(__file__).resolve().parents[2] / "src"


def at_step(step: int, act: Callable[[], None]) -> Callable[[Event], None]:
    return lambda event: act() if isinstance(event, StepEnded) and event.step == step else None


def resumed_equals_straight(go: Go) -> None:
    straight, again = go({}, "straight"), go({}, resume=True)
    assert again.error is None
    assert again.losses == straight.losses
    assert same(again.weights, straight.weights)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends(go: Go, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    ran = go({}, sinks=[at_step(2, lambda: os.kill(os.getpid(), number))])
    assert ran.error is not None
    assert ran.error.exit_code == 75
    assert number.name in str(ran.error)
    assert [event.step for event in ran.of(StepEnded)] == [1, 2], "no work is lost and no step is begun"
    assert ran.states == [2]
    assert ran.of(RunEnded)[0].stopped
    assert signal.getsignal(number) is before
    resumed_equals_straight(go)


def test_a_stop_file_does_the_same(go: Go, run_config: Callable[..., object], tmp_path: Path) -> None:
    ran = go({}, sinks=[at_step(3, lambda: (tmp_path / "run" / "STOP").write_text(""))])
    assert ran.error is not None
    assert ran.error.exit_code == 75
    assert "STOP file" in str(ran.error)
    assert ran.states == [3]
    assert not (ran.folder / "STOP").exists(), "it stops one start, not the next one too"
    resumed_equals_straight(go)


def test_a_signal_inside_a_save_lets_it_finish(go: Go) -> None:
    def sink(event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    ran = go({"checkpoint.every": 1, "checkpoint.keep": 9}, sinks=[sink])
    assert ran.error is not None
    assert ran.error.exit_code == 75
    assert ran.states == [1, 2, 3]


def test_a_stop_in_the_last_step_leaves_only_the_file_to_write(go: Go) -> None:
    ran = go({}, sinks=[at_step(4, lambda: os.kill(os.getpid(), signal.SIGINT))])
    assert ran.error is not None
    assert ran.states == [4]
    again = go({}, resume=True)
    assert again.of(StepEnded) == []
    assert (again.folder / "weights" / "w.safetensors").exists()


def test_handlers_belong_to_the_main_thread(tmp_path: Path) -> None:
    """A run inside a thread (a notebook, a server) has the STOP file only."""
    seen: list[bool] = []

    def work() -> None:
        with StopSwitch(tmp_path) as switch:
            (tmp_path / "STOP").touch()
            seen.append(switch.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]


# ---- the real command ---------------------------------------------------------------------------------------------


@pytest.fixture
def command(tiny_model: Path, tmp_path: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """`command("--resume")` starts `fluxsmith train` on a run of many steps."""
    path = tmp_path / "run.toml"
    path.write_text(to_toml(tiny_run.config(tiny_model, tmp_path / "run", {"train.steps": 100_000, "checkpoint.every": 0})))

    def start(*arguments: str) -> "subprocess.Popen[str]":
        environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", "fluxsmith", "train", str(path), "--quiet", *arguments]
        return subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start


def wait_for_steps(tmp_path: Path, count: int) -> None:
    path, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 100
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < deadline, "the run does not get going"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_with_75_and_says_how_to_go_on(
    command: Callable[..., "subprocess.Popen[str]"], tmp_path: Path, number: signal.Signals
) -> None:
    process = command()
    wait_for_steps(tmp_path, 3)
    process.send_signal(number)
    begun = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert len(list((tmp_path / "run" / "state").glob("step-*"))) == 1
    assert time.monotonic() - begun < 20, "2 s on an idle machine"


def test_the_second_signal_leaves_at_once(tmp_path: Path) -> None:
    """Between the first and the next step's end nothing is written, and the exit status is the signal's."""
    script = (
        "import os, signal, sys, time; from pathlib import Path; from fluxsmith.train.stop import StopSwitch\n"
        "with StopSwitch(Path(sys.argv[1])) as switch:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert switch.requested\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(30)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGINT, done.stderr
