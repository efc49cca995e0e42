"""events.jsonl: one strict JSON object a line, whatever the events hold and however the file was torn."""

import json
from pathlib import Path
from typing import Any

import pytest

from fluxsmith.events import CacheProgress, RunStarted, SampleReady, StepEnded, Warned
from fluxsmith.io.durable import Disk
from fluxsmith.train.sinks.jsonl import JsonlSink, read_events


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def step(number: int, loss: float = 0.5) -> StepEnded:
    return StepEnded(number, 1, loss, 1e-4, 0.1, 0.01)


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


def test_one_line_an_event_with_its_name_and_time(path: Path) -> None:
    sink = JsonlSink(path, Disk())
    sink(RunStarted("runs/cats", 10, 0, {"train": {"steps": 10}}, {"device": "cpu"}))
    sink(step(1))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["event"] for row in rows] == ["RunStarted", "StepEnded"]
    assert rows[0]["config"] == {"train": {"steps": 10}}
    assert rows[1]["loss"] == 0.5
    assert rows[0]["time"] <= rows[1]["time"]


def test_cache_progress_is_written_at_its_end(path: Path) -> None:
    sink = JsonlSink(path, Disk())
    for done in range(4):
        sink(CacheProgress("latents", done, 3))
    assert [event["done"] for event in read_events(path)] == [3]


def test_values_that_are_not_finite_are_null(path: Path) -> None:
    sink = JsonlSink(path, Disk())
    sink(step(1, float("nan")))
    sink(StepEnded(2, 1, float("inf"), 1e-4, float("-inf"), 0.01, extras={"inner": float("nan")}))
    rows = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [row["loss"] for row in rows] == [None, None]
    assert rows[1]["grad_norm"] is None
    assert rows[1]["extras"] == {"inner": None}


@pytest.mark.parametrize("text", ["a\nb", "a\u2028b", "a\x85b", "a\x0bb", "猫 \U0001f600", '"quotes" and \\'])
def test_any_text_stays_on_its_line(path: Path, text: str) -> None:
    sink = JsonlSink(path, Disk())
    sink(SampleReady(0, 0, text, "0.png"))
    sink(Warned("after"))
    first, second = read_events(path)
    assert first["prompt"] == text
    assert second["message"] == "after"


@pytest.mark.parametrize("cut", [1, 8, 20])
def test_a_torn_line_loses_itself_only(path: Path, cut: int) -> None:
    """A kill in the middle of a write; the cut may fall inside a character."""
    sink = JsonlSink(path, Disk())
    sink(step(1))
    sink(Warned("ü" * 20))
    path.write_bytes(path.read_bytes()[:-cut])
    assert [event["event"] for event in read_events(path)][:1] == ["StepEnded"]
    JsonlSink(path, Disk())(step(2))  # the next session
    assert [event["step"] for event in read_events(path) if event["event"] == "StepEnded"] == [1, 2]


def test_lines_that_are_no_events_are_passed_over(path: Path) -> None:
    path.write_text('[1]\n{"event": "Warned", "message": "a"}\n{}\n12\n\n')
    assert [event["message"] for event in read_events(path)] == ["a"]


def test_no_file_is_no_events(path: Path) -> None:
    assert read_events(path) == []
