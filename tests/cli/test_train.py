"""`fluxsmith train` as a user types it: exit codes, messages, resume, stop, what is on the screen and in the run folder."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxsmith.cli.main import run
from fluxsmith.io.durable import RunLock
from fluxsmith.train.sinks.jsonl import read_events

Make = Callable[..., Path]
SAMPLE = {"prompt": "a red circle", "width": 32, "height": 32, "steps": 1, "every": 2}


def kinds(run_dir: Path) -> list[str]:
    return [event["event"] for event in read_events(run_dir / "events.jsonl")]


def losses(run_dir: Path) -> list[str]:
    return [json.loads(line)["loss_hex"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "fluxsmith", "train", *map(str, arguments)]


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_is_a_folder(tiny_run_file: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "cats"
    file = tiny_run_file(run_dir, {"sample": [SAMPLE], "checkpoint": {"every": 2}, "validation": {"every": 2, "share": 0.25}})
    assert run(["train", str(file)]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [f"weights: {run_dir}/weights/cats.safetensors", f"report: {run_dir}/report.html"]
    for words in ("steps 0 to 4", "step 1/4  loss ", "step 4/4", "0 s left", "loads in sd-scripts, ComfyUI", "done at step 4 after"):
        assert words in shown.err
    assert "\x1b" not in shown.err  # no bar, no colours without a terminal
    assert {path.name for path in run_dir.iterdir()} >= {
        "run.toml",
        "events.jsonl",
        "metrics.jsonl",
        "report.html",
        "state",
        "weights",
        "samples",
    }
    assert sorted(path.name for path in (run_dir / "weights").iterdir()) == ["cats-step00000002.safetensors", "cats.safetensors"]
    assert len(list((run_dir / "samples").iterdir())) == 3  # before, step 2, step 4


def test_the_event_log(tiny_run_file: Make, tmp_path: Path) -> None:
    run_dir = tmp_path / "cats"
    changes = {"sample": [SAMPLE], "checkpoint": {"every": 2}, "validation": {"every": 2, "share": 0.25}}
    assert run(["train", str(tiny_run_file(run_dir, changes)), "train.seed=9", "--quiet"]) == 0
    events = {kind: [e for e in read_events(run_dir / "events.jsonl") if e["event"] == kind] for kind in kinds(run_dir)}
    (started,) = events["RunStarted"]
    assert (started["total_steps"], started["start_step"]) == (4, 0)
    assert started["config"]["train"]["seed"] == 9
    assert started["facts"]["trained"] > 0
    assert started["facts"]["device"] == "cpu"
    assert [event["step"] for event in events["StepEnded"]] == [1, 2, 3, 4]
    for event in events["StepEnded"]:
        assert event["loss"] > 0
        assert event["grad_norm"] > 0
        assert event["seconds"] > 0
        assert event["peak_bytes"] > 1_000_000
        assert event["lr"] == 1e-3
    assert [event["step"] for event in events["SampleReady"]] == [0, 2, 4]
    assert [event["step"] for event in events["CheckpointSaved"]] == [2, 4]
    assert [event["step"] for event in events["ValidationEnded"]] == [2, 4]
    assert set(events["ValidationEnded"][0]["by_timestep"]) == {"0.2", "0.4", "0.6", "0.8"}
    assert [event["step"] for event in events["WeightsSaved"]] == [2, 4]
    assert set(events["WeightsSaved"][-1]["verdict"]["loads_in"]) == {"sd-scripts", "ComfyUI", "Forge", "diffusers"}
    (ended,) = events["RunEnded"]
    assert (ended["step"], ended["stopped"]) == (4, False)
    assert ended["weights"] == str(run_dir / "weights" / "cats.safetensors")
    times = [event["time"] for event in read_events(run_dir / "events.jsonl")]
    assert times == sorted(times)


def test_quiet_shows_the_result_only(tiny_run_file: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(tiny_run_file(tmp_path / "cats")), "train.steps=1", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert len(shown.out.splitlines()) == 2


def test_changes_on_the_command_line(tiny_run_file: Make, tmp_path: Path) -> None:
    file = tiny_run_file(tmp_path / "cats")
    assert run(["train", str(file), "train.steps=2", f"run.dir={tmp_path / 'dogs'}", "adapter.rank=3", "--quiet"]) == 0
    assert kinds(tmp_path / "dogs").count("StepEnded") == 2
    assert "rank = 3" in (tmp_path / "dogs" / "run.toml").read_text()
    assert not (tmp_path / "cats").exists()


def test_the_written_run_file_runs_again(tiny_run_file: Make, tmp_path: Path) -> None:
    assert run(["train", str(tiny_run_file(tmp_path / "cats")), "train.steps=2", "--quiet"]) == 0
    assert run(["train", str(tmp_path / "cats" / "run.toml"), f"run.dir={tmp_path / 'again'}", "--quiet"]) == 0
    assert losses(tmp_path / "cats") == losses(tmp_path / "again")


# ---- resume ---------------------------------------------------------------------------------------------------------


def test_a_folder_with_a_run_needs_resume(tiny_run_file: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tiny_run_file(tmp_path / "cats"))
    assert run(["train", file, "train.steps=2", "--quiet"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "cats").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(["train", file, "--quiet"]) == 2
    message = capsys.readouterr().err
    assert "this folder holds a run already" in message
    assert "add --resume" in message
    assert str(tmp_path / "cats") in message
    assert {path: path.read_bytes() for path in (tmp_path / "cats").rglob("*") if path.is_file()} == before


@pytest.mark.ledger("ST-40")
def test_resume_goes_on_where_it_was(tiny_run_file: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    straight, cut = tiny_run_file(tmp_path / "straight"), tiny_run_file(tmp_path / "cut")
    assert run(["train", str(straight), "--quiet"]) == 0
    assert run(["train", str(cut), "train.steps=2", "--quiet"]) == 0
    capsys.readouterr()
    assert run(["train", str(cut), "--resume"]) == 0
    shown = capsys.readouterr().err
    assert "resumed from step 2" in shown
    assert "steps 2 to 4" in shown
    assert "train.steps" in shown  # the schedule differs: said, not refused
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")
    assert kinds(tmp_path / "cut").count("RunStarted") == 2
    newest = "state/step-000004/weights.safetensors"
    assert (tmp_path / "cut" / newest).read_bytes() == (tmp_path / "straight" / newest).read_bytes()


def test_resume_of_nothing_begins(tiny_run_file: Make, tmp_path: Path) -> None:
    assert run(["train", str(tiny_run_file(tmp_path / "cats")), "train.steps=1", "--resume", "--quiet"]) == 0


def test_resume_with_a_changed_run_is_refused_with_a_diff(tiny_run_file: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tiny_run_file(tmp_path / "cats"))
    assert run(["train", file, "train.steps=2", "--quiet"]) == 0
    capsys.readouterr()
    assert run(["train", file, "train.seed=4", "noise.guidance=2.0", "--resume", "--quiet"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert any("train.seed was 3 when the run was saved and is 4 now" in line for line in lines)
    assert all("--allow-change" in line for line in lines)
    allowed = ["--allow-change", "train.seed", "--allow-change", "noise.guidance"]
    assert run(["train", file, "train.seed=4", "noise.guidance=2.0", "--resume", *allowed]) == 0
    assert "not exact from step 2" in capsys.readouterr().err


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        (["train.stepz=3"], 2, "train.stepz"),
        (["train.steps=0"], 2, "train.steps"),
        (["optim.options.momentum=0.5"], 2, "adamw has no option momentum"),
        (["adapter.targets=nothing_like_this"], 2, "nothing_like_this"),
        (["data.0.path=nowhere"], 3, "nowhere"),
        (["data.0.batch_size=50"], 0, ""),  # a warning: one batch of what is there
        (["model.path=nowhere.safetensors"], 4, "nowhere.safetensors"),
        (["train.max_grad_norm=0", "optim.lr=1e36"], 5, "the weights were not touched"),
        (["run.dir=/proc/nowhere"], 7, "/proc/nowhere"),
        pytest.param(
            ["train.device=cuda"], 2, "no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_exit_codes(
    tiny_run_file: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], code: int, words: str
) -> None:
    file = tiny_run_file(tmp_path / "cats")
    assert run(["train", str(file), *changes]) == code
    shown = capsys.readouterr().err
    assert words in shown
    assert "Traceback" not in shown
    if code:
        assert "Fix: " in shown


def test_a_wrong_file_in_a_role_is_named(tiny_run_file: Make, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_run_file(tmp_path / "cats", {"model.clip_l": str(tiny_model / "t5xxl.safetensors")})
    assert run(["train", str(file)]) == 4
    shown = capsys.readouterr().err
    assert "t5xxl.safetensors" in shown
    assert "T5" in shown


def test_a_failure_is_in_the_log_and_the_report(tiny_run_file: Make, tmp_path: Path) -> None:
    file = tiny_run_file(tmp_path / "cats")
    assert run(["train", str(file), "data.0.path=nowhere", "--quiet"]) == 3
    failed = read_events(tmp_path / "cats" / "events.jsonl")[-1]
    assert (failed["event"], failed["kind"], failed["exit_code"]) == ("RunFailed", "data", 3)
    assert "nowhere" in failed["message"]
    assert "failed: " in (tmp_path / "cats" / "report.html").read_text()


def test_a_folder_in_use_is_exit_8(tiny_run_file: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_run_file(tmp_path / "cats")
    (tmp_path / "cats").mkdir()
    with RunLock(tmp_path / "cats"):
        assert run(["train", str(file), "--quiet"]) == 8
    shown = capsys.readouterr().err
    assert str(os.getpid()) in shown
    assert "Traceback" not in shown
    assert run(["train", str(file), "train.steps=1", "--quiet"]) == 0


# ---- sinks ----------------------------------------------------------------------------------------------------------

BROKEN = '''
from fluxsmith.config.section import PluginConfig

class Config(PluginConfig):
    """Raises at a step."""

    step: int = 2
    """When."""

    def build(self, run):
        return Broken(self.step)

class Broken:
    name = "broken"

    def __init__(self, step):
        self.step = step

    def __call__(self, event):
        if type(event).__name__ == "StepEnded" and event.step == self.step:
            raise OSError("the tracker is down")
'''


def test_a_sink_that_raises_is_switched_off_and_the_run_goes_on(
    tiny_run_file: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    plain, with_sink = tiny_run_file(tmp_path / "plain"), tiny_run_file(tmp_path / "cats", {"sinks": [{"type": "broken"}]})
    assert run(["train", str(plain), "--quiet"]) == 0
    assert run(["train", str(with_sink), "--plugin", str(tmp_path / "broken.py")]) == 0
    shown = capsys.readouterr().err
    assert shown.count("broken was switched off: OSError: the tracker is down") == 1
    warned = [event for event in read_events(tmp_path / "cats" / "events.jsonl") if event["event"] == "Warned"]
    assert [event["message"] for event in warned] == ["broken was switched off: OSError: the tracker is down"]
    assert losses(tmp_path / "cats") == losses(tmp_path / "plain")
    assert "the tracker is down" in (tmp_path / "cats" / "report.html").read_text()


def test_tensorboard_follows_a_run_and_its_resume(tiny_run_file: Make, tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    file = tiny_run_file(tmp_path / "cats", {"sinks": [{"type": "tensorboard"}], "sample": [SAMPLE]})
    assert run(["train", str(file), "train.steps=2", "--quiet"]) == 0
    assert run(["train", str(file), "--resume", "--quiet"]) == 0
    reader: Any = accumulators.EventAccumulator(str(tmp_path / "cats" / "tensorboard"))
    reader.Reload()
    found = [(event.step, event.value) for event in reader.Scalars("train/loss")]
    assert [step for step, _ in found] == [1, 2, 3, 4]
    assert [value for _, value in found] == pytest.approx([float.fromhex(text) for text in losses(tmp_path / "cats")])
    assert [event.step for event in reader.Images("sample/p00_s42")] == [0, 2, 4]


# ---- a terminal, and stopping ---------------------------------------------------------------------------------------


def test_a_terminal_shows_a_bar(tiny_run_file: Make, tmp_path: Path) -> None:
    file = tiny_run_file(tmp_path / "cats", {"train.steps": 30})
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "160"}
    with subprocess.Popen(command(file), stderr=slave, stdout=subprocess.PIPE, env=environment) as child:
        os.close(slave)
        shown = b""
        while chunk := _read(master):
            shown += chunk
        assert child.wait(60) == 0
    os.close(master)
    text = shown.decode()
    assert "30/30" in text
    assert "steps/s" in text
    assert "━" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other end of a pseudo terminal has closed
        return b""


STOPPER = """
import signal
from pathlib import Path
from fluxsmith.config.section import PluginConfig

class Config(PluginConfig):
    how: str

    def build(self, run):
        return Stopper(self.how, run.run.dir)

class Stopper:
    def __init__(self, how, folder):
        self.how, self.folder = how, folder

    def __call__(self, event):
        if type(event).__name__ == "StepEnded" and event.step == 2:
            if self.how == "STOP":
                (self.folder / "STOP").touch()
            else:
                signal.raise_signal(getattr(signal, self.how))
"""


def check_stopped(run_dir: Path) -> int:
    last = read_events(run_dir / "events.jsonl")[-1]
    assert (last["event"], last["stopped"]) == ("RunEnded", True)
    assert (run_dir / f"state/step-{last['step']:06d}/MANIFEST.json").is_file()
    assert "stopped on request" in (run_dir / "report.html").read_text()
    assert not (run_dir / "STOP").exists()
    return int(last["step"])


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "STOP"])
def test_a_stop_saves_and_is_exit_75(tiny_run_file: Make, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "stopper.py").write_text(STOPPER)
    file = str(tiny_run_file(tmp_path / "cats", {"sinks": [{"type": "stopper", "how": how}]}))
    plugin = ["--plugin", str(tmp_path / "stopper.py"), "--quiet"]
    assert run(["train", file, *plugin]) == 75
    assert check_stopped(tmp_path / "cats") == 2
    shown = capsys.readouterr().err
    assert how in shown
    assert "stopped by" in shown
    assert "the state is saved" in shown
    assert "--resume" in shown
    assert run(["train", file, *plugin, "--resume"]) == 0
    assert run(["train", str(tiny_run_file(tmp_path / "straight")), "--quiet"]) == 0
    assert losses(tmp_path / "cats") == losses(tmp_path / "straight")


def test_ctrl_c_on_the_real_command(tiny_run_file: Make, tmp_path: Path) -> None:
    file = tiny_run_file(tmp_path / "cats", {"train.steps": 100_000})
    with subprocess.Popen(command(file), stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + 60
        while "StepEnded" not in kinds(tmp_path / "cats") and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 75
        shown = child.stderr.read() if child.stderr else ""
    assert "the state is saved" in shown
    assert "Traceback" not in shown
    check_stopped(tmp_path / "cats")
