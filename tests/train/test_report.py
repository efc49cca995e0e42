"""report.html: everything about a run in one file, nothing from elsewhere, whatever captions and paths hold."""

import base64
import html.parser
import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fluxsmith.config.load import load_config
from fluxsmith.events import (
    Bus,
    CheckpointSaved,
    Event,
    RunEnded,
    RunFailed,
    RunStarted,
    SampleReady,
    StepEnded,
    ValidationEnded,
    Warned,
    WeightsSaved,
)
from fluxsmith.io.durable import Disk
from fluxsmith.train.report import LARGEST, render, write_report
from fluxsmith.train.run import train
from fluxsmith.train.sinks.jsonl import JsonlSink

pytestmark = pytest.mark.ledger("FS-10")
XSS = "<script>alert(1)</script> <img src=x onerror=alert(2)> \" onload='x' &amp; </pre>"


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text under each heading."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {"": ""}
        self.heading = ""
        self.reads_heading = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.reads_heading = tag == "h2"
        if self.reads_heading:
            self.heading = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "h2":
            self.sections[self.heading] = ""
            self.reads_heading = False

    def handle_data(self, data: str) -> None:
        if self.reads_heading:
            self.heading += data
        else:
            self.sections[self.heading] = self.sections.get(self.heading, "") + data + "\n"

    def pictures(self) -> list[Image.Image]:
        data = [str(attributes["src"]).partition("base64,")[2] for tag, attributes in self.tags if tag == "img"]
        return [Image.open(io.BytesIO(base64.b64decode(text))) for text in data]


def written(run_dir: Path, events: list[Event], config: str = "") -> Page:
    """The page of a folder with these events."""
    run_dir.mkdir(parents=True, exist_ok=True)
    sink = JsonlSink(run_dir / "events.jsonl", Disk())
    for event in events:
        sink(event)
    (run_dir / "run.toml").write_text(config)
    return Page(render(run_dir))


def steps(first: int, last: int, **changes: Any) -> list[Event]:
    values = {"loss": 0.5, "lr": 1e-3, "grad_norm": 1.0, "seconds": 0.25, "peak_bytes": 2_000_000, **changes}
    return [StepEnded(number, 1, **values) for number in range(first, last + 1)]


def sample(run_dir: Path, step: int, prompt: str = "a cat", size: tuple[int, int] = (32, 32)) -> SampleReady:
    path = run_dir / "samples" / f"step-{step:06d}_p00_s42.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (step % 256, 0, 0)).save(path)
    return SampleReady(step, 0, prompt, str(path), 0.5)


STARTED = RunStarted("r", 8, 0, {}, {"trained": 123456, "world_size": 1, "device": "cpu"})


@pytest.fixture(scope="module")
def finished(tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of six steps with hostile captions."""
    run_dir = tmp_path_factory.mktemp("report") / "cats & <dogs>"
    sampled = {"prompt": XSS, "every": 2, "width": 32, "height": 32, "steps": 1}
    changes = {"train.steps": 6, "sample": [sampled], "validation": {"every": 3, "share": 0.25}, "checkpoint": {"every": 3}}
    train(load_config(tiny_run(run_dir, changes)).config, bus=Bus())
    return run_dir


def test_a_real_run_has_every_section(finished: Path) -> None:
    page = Page((finished / "report.html").read_text(encoding="utf-8"))
    titles = ["Before and after", "Loss", "Validation loss", "Learning rate", "Samples over steps", "Weights", "Time and memory"]
    assert [title for title in page.sections if title in titles] == titles
    assert "complete" in page.sections[""]
    assert "6 of 6" in page.sections[""]
    assert "peak memory" in page.sections["Time and memory"]
    assert re.search(r"steps\n\d+\.\d s; one takes 0\.\d+ s", page.sections["Time and memory"])
    assert "2 states" in page.sections["Time and memory"] or "states saved" in page.sections["Time and memory"]
    assert "loads in" in page.sections["Weights"]
    assert "rank = 2" in page.sections["Configuration"]
    assert len(page.pictures()) == 2 + 4  # before and after; steps 0, 2, 4, 6
    assert sum(tag == "svg" for tag, _ in page.tags) == 3


def test_it_needs_nothing_from_elsewhere(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    outside = text.replace("</", "").split("<pre>")[0]
    assert "http:" not in outside
    assert "https:" not in outside
    for tag, attributes in Page(text).tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        assert not [name for name in attributes if name.startswith("on")]
        assert str(attributes.get("src", "data:image/")).startswith("data:image/")
        assert "href" not in attributes
    policies = [a["content"] for tag, a in Page(text).tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_captions_names_and_messages_are_text(finished: Path, tmp_path: Path) -> None:
    page = Page((finished / "report.html").read_text(encoding="utf-8"))
    assert XSS in page.sections["Before and after"]
    assert "cats & <dogs>" in page.sections[""]
    events = [Warned(XSS), RunFailed(0, "data", XSS, 3), WeightsSaved(1, XSS, {"line": XSS})]
    other = written(tmp_path / "r", events, config=XSS)
    for title in ("", "Warnings", "Weights", "Configuration"):
        assert XSS in other.sections[title], title
    assert {tag for tag, _ in other.tags} & {"script", "img"} == set()


def test_before_and_after_are_the_first_and_the_last_picture(tmp_path: Path) -> None:
    page = written(tmp_path, [STARTED, *[sample(tmp_path, step) for step in (0, 100, 200)]])
    colours = [picture.convert("RGB").getpixel((0, 0)) for picture in page.pictures()]
    assert colours == [(0, 0, 0), (200, 0, 0), (0, 0, 0), (100, 0, 0), (200, 0, 0)]


def test_large_pictures_are_embedded_small(tmp_path: Path) -> None:
    page = written(tmp_path, [STARTED, sample(tmp_path, 0, size=(1024, 768)), sample(tmp_path, 8, size=(1024, 768))])
    assert {picture.size for picture in page.pictures()} == {(LARGEST, 384)}
    assert {picture.format for picture in page.pictures()} == {"JPEG"}


def test_a_moved_folder_still_has_its_pictures(tmp_path: Path) -> None:
    written(tmp_path / "old", [STARTED, sample(tmp_path / "old", 0), sample(tmp_path / "old", 8)])
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert len(Page(render(tmp_path / "new")).pictures()) == 2


def test_lost_pictures_are_said(tmp_path: Path) -> None:
    events = [STARTED, sample(tmp_path, 0), sample(tmp_path, 8)]
    shutil.rmtree(tmp_path / "samples")
    assert written(tmp_path, events).sections["Before and after"].count("missing") == 2


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([], "not started"),
        ([STARTED], "not finished"),
        ([STARTED, *steps(1, 3)], "not finished"),
        ([STARTED, *steps(1, 3), RunEnded(3, stopped=True, seconds=1)], "stopped on request"),
        ([STARTED, *steps(1, 8), RunEnded(8, stopped=False, seconds=1)], "complete"),
        ([RunFailed(0, "data", "error[data]: no pictures", 3)], "failed: error[data]: no pictures"),
        ([STARTED, RunFailed(0, "x", "first", 5), STARTED, *steps(1, 8), RunEnded(8, stopped=False, seconds=1)], "complete"),
        ([STARTED, RunEnded(3, stopped=True, seconds=1), STARTED, *steps(1, 2)], "not finished"),
        ([STARTED, *steps(1, 2), Warned("x"), CheckpointSaved(2, "s")], "not finished"),
    ],
)
def test_the_state_is_that_of_the_last_session(tmp_path: Path, events: list[Event], words: str) -> None:
    assert words in written(tmp_path, events).sections[""]


def test_steps_that_a_resume_takes_back_do_not_count(tmp_path: Path) -> None:
    again = RunStarted("r", 8, 4, {}, {})
    page = written(tmp_path, [STARTED, *steps(1, 6, loss=9.0), again, *steps(5, 8, loss=1.0), RunEnded(8, stopped=False, seconds=1)])
    curve = next(attributes for tag, attributes in page.tags if tag == "polyline" and attributes["class"] == "curve thin")
    assert len(str(curve["points"]).split()) == 8
    assert "8 of 8" in page.sections[""]
    assert "2 s" in page.sections[""]  # 8 steps of 0.25 s


def test_losses_that_are_not_finite_do_not_break_the_page(tmp_path: Path) -> None:
    page = written(tmp_path, [STARTED, *steps(1, 3), *steps(4, 4, loss=float("nan"), grad_norm=float("inf")), *steps(5, 6)])
    assert "Loss" in page.sections


def test_a_validation_curve(tmp_path: Path) -> None:
    page = written(tmp_path, [STARTED, *steps(1, 2), ValidationEnded(1, 0.5), ValidationEnded(2, 0.25)])
    assert "Validation loss" in page.sections


def test_torn_events_are_no_obstacle(tmp_path: Path) -> None:
    written(tmp_path, [STARTED, *steps(1, 4)])
    path = tmp_path / "events.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    assert "3 of 8" in Page(render(tmp_path)).sections[""]


def test_the_file_is_written(tmp_path: Path) -> None:
    written(tmp_path, [STARTED, *steps(1, 4)])
    path = write_report(tmp_path, Disk())
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
