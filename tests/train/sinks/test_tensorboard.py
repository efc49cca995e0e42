"""TensorBoard files, read back by TensorBoard's own reader."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fluxsmith.config.load import load_config
from fluxsmith.errors import ConfigError
from fluxsmith.events import Event, RunEnded, RunFailed, RunStarted, SampleReady, StepEnded, ValidationEnded
from fluxsmith.train.sinks.tensorboard import Config, TensorBoardSink

accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read(folder: Path) -> Any:
    reader = accumulators.EventAccumulator(str(folder))
    reader.Reload()
    return reader


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def steps(first: int, last: int, loss: float = 0.5) -> list[Event]:
    return [StepEnded(number, 1, loss, 0.25, 2.0, 0.01) for number in range(first, last + 1)]


def send(folder: Path, events: list[Event]) -> None:
    sink = TensorBoardSink(str(folder))
    for event in events:
        sink(event)


@pytest.fixture
def sample(tmp_path: Path) -> SampleReady:
    path = tmp_path / "step-000002_p00_s42.png"
    Image.new("RGB", (24, 16), (255, 0, 0)).save(path)
    return SampleReady(2, 0, "a cat", str(path))


def test_scalars_and_pictures(tmp_path: Path, sample: SampleReady) -> None:
    events = [RunStarted("r", 3, 0, {}), *steps(1, 3), sample, ValidationEnded(3, 0.75), RunEnded(3, stopped=False, seconds=1)]
    send(tmp_path / "tb", events)
    assert scalars(tmp_path / "tb", "train/loss") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert scalars(tmp_path / "tb", "train/lr") == [(1, 0.25), (2, 0.25), (3, 0.25)]
    assert scalars(tmp_path / "tb", "train/grad_norm")[0] == (1, 2.0)
    assert scalars(tmp_path / "tb", "validation/loss") == [(3, 0.75)]
    (picture,) = read(tmp_path / "tb").Images("sample/p00_s42")
    assert (picture.step, picture.width, picture.height) == (2, 24, 16)


def test_a_failed_run_is_written_out_too(tmp_path: Path) -> None:
    send(tmp_path / "tb", [RunStarted("r", 9, 0, {}), *steps(1, 2), RunFailed(2, "numeric", "nan", 5)])
    assert len(scalars(tmp_path / "tb", "train/loss")) == 2


def test_a_resumed_run_hides_the_steps_it_computes_again(tmp_path: Path) -> None:
    """Killed at step 5, resumed from the state of step 2."""
    send(tmp_path / "tb", [RunStarted("r", 6, 0, {}), *steps(1, 5), RunFailed(0, "x", "", 70)])
    send(tmp_path / "tb", [RunStarted("r", 6, 2, {}), *steps(3, 6, loss=0.125), RunEnded(6, stopped=False, seconds=1)])
    assert scalars(tmp_path / "tb", "train/loss") == [(1, 0.5), (2, 0.5), (3, 0.125), (4, 0.125), (5, 0.125), (6, 0.125)]


def test_nothing_is_written_before_the_run_starts(tmp_path: Path) -> None:
    send(tmp_path / "tb", [ValidationEnded(3, 0.75), RunFailed(0, "data", "no pictures", 3)])
    assert not (tmp_path / "tb").exists()


def test_the_folder(tiny_run: Any, tmp_path: Path) -> None:
    run = load_config(tiny_run(tmp_path / "run")).config
    assert Config(type="tensorboard").build(run).folder == str(tmp_path / "run" / "tensorboard")
    assert Config(type="tensorboard", dir="elsewhere").build(run).folder == "elsewhere"


def test_without_the_package_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'fluxsmith\[tensorboard\]'"):
        TensorBoardSink("x")
