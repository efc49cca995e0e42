"""What a run shows on a terminal, and as plain lines without one."""

import io
import re

import pytest
from rich.console import Console

from fluxsmith.events import (
    CacheProgress,
    CheckpointSaved,
    Event,
    PhaseStarted,
    RunEnded,
    RunFailed,
    RunStarted,
    SampleReady,
    StepEnded,
    ValidationEnded,
    Warned,
    WeightsSaved,
)
from fluxsmith.train.sinks.progress import LINES, ProgressSink, describe, duration


def sink(*, terminal: bool) -> tuple[ProgressSink, io.StringIO]:
    out = io.StringIO()
    return ProgressSink(Console(file=out, force_terminal=terminal, width=200, color_system=None)), out


def step(number: int, seconds: float = 0.5) -> StepEnded:
    return StepEnded(number, 1, 0.25, 1e-4, 0.1, seconds)


STARTED = RunStarted("runs/cats", 1000, 0, {})


def plain(events: list[Event]) -> list[str]:
    shown, out = sink(terminal=False)
    for event in events:
        shown(event)
    return out.getvalue().splitlines()


def test_plain_lines_are_few_and_tell_loss_rate_and_time_left() -> None:
    lines = plain([STARTED, *[step(number) for number in range(1, 1001)]])
    assert lines[0] == "run runs/cats: steps 0 to 1000"
    assert lines[1] == "step 1/1000  loss 0.2500  lr 1.00e-04  2.00 steps/s  8 min 20 s left"
    assert lines[2].startswith("step 50/1000 ")
    assert lines[-1].endswith("0 s left")
    assert len(lines) == 2 + LINES
    assert not any("\x1b" in line for line in lines)


def test_the_time_left_follows_the_rate() -> None:
    """New steps weigh a twentieth: one slow step does not make the estimate jump."""
    lines = plain([STARTED, *[step(number) for number in range(1, 50)], step(50, seconds=5.0)])
    assert re.search(r"1\.91 steps/s  8 min 17 s left", lines[-1])


def test_a_resumed_run_begins_where_it_was() -> None:
    lines = plain([RunStarted("runs/cats", 1000, 600, {}), step(601)])
    assert lines == ["run runs/cats: steps 600 to 1000", "step 601/1000  loss 0.2500  lr 1.00e-04  2.00 steps/s  3 min 20 s left"]


def test_short_runs_show_every_step() -> None:
    assert len(plain([RunStarted("r", 3, 0, {}), step(1), step(2), step(3)])) == 4


def test_long_caches_say_that_they_live() -> None:
    begun = 1e10  # far after the sink was made
    events = [CacheProgress("latents", done, 100, time=begun + done) for done in range(101)]
    assert plain(events) == [f"latents: {done} of 100" for done in (*range(0, 100, 10), 100)]
    assert plain([CacheProgress("latents", done, 100, time=0) for done in range(101)]) == ["latents: 100 of 100"]


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (PhaseStarted("load", "reading headers"), "load: reading headers"),
        (Warned("careful"), "warning: careful"),
        (CheckpointSaved(5, "state/step-000005"), "state saved: state/step-000005"),
        (WeightsSaved(5, "w.safetensors", {"line": "loads in diffusers"}), "weights saved: w.safetensors (loads in diffusers)"),
        (WeightsSaved(5, "w.safetensors"), "weights saved: w.safetensors"),
        (SampleReady(5, 0, "a cat", "0.png"), "sample: 0.png"),
        (ValidationEnded(5, 0.125), "validation loss at step 5: 0.1250"),
        (RunFailed(5, "data", "bad", 3), ""),
    ],
)
def test_lines(event: Event, text: str) -> None:
    assert describe(event) == text
    assert plain([event]) == ([text] if text else [])


def test_markup_in_texts_is_text() -> None:
    assert plain([Warned("[bold]x[/bold] [/nothing]")]) == ["warning: [bold]x[/bold] [/nothing]"]


@pytest.mark.parametrize("end", [RunEnded(3, stopped=False, seconds=75), RunFailed(3, "numeric", "loss nan", 5)])
def test_the_bar_goes_away_at_the_end(end: Event) -> None:
    shown, out = sink(terminal=True)
    for event in (STARTED, step(1), step(2), Warned("careful"), step(3)):
        shown(event)
    assert shown.bar is not None
    shown(end)
    assert shown.bar is None
    assert "3/1000" in out.getvalue()
    assert "loss 0.2500" in out.getvalue()
    assert "warning: careful" in out.getvalue()
    assert out.getvalue().rstrip().endswith("done at step 3 after 1 min 15 s") == isinstance(end, RunEnded)
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h")  # the cursor is back


def test_a_terminal_has_a_bar_for_caches() -> None:
    shown, out = sink(terminal=True)
    shown(CacheProgress("latents", 1, 3))
    assert shown.bar is not None
    shown(CacheProgress("latents", 2, 3))
    shown(CacheProgress("latents", 3, 3))
    assert shown.bar is None
    assert "latents: 3 of 3" in out.getvalue()


def test_a_stop_is_not_an_end() -> None:
    assert plain([RunEnded(3, stopped=True, seconds=0.4)]) == ["stopped at step 3 after 0 s"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (754, "12 min 34 s"), (9000, "2 h 30 min"), (2e5, "55 h 33 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
