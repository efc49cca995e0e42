"""Every item of the bad-input corpus ends in the outcome written beside it, named, with a cure, and without a traceback."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fluxsmith.config.load import load_config
from fluxsmith.data.checks import report_on
from fluxsmith.data.scan import scan
from fluxsmith.data.sources.folder import Config
from fluxsmith.errors import FluxsmithError
from fluxsmith.io.identify import require_role

CORPUS = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("corpus.py"))))
NUM_GOOD = 3

pytestmark = pytest.mark.timeout(30)


def names(items: list[Any]) -> list[str]:
    return [item.name for item in items]


def check_message(text: str, item: Any) -> None:
    assert item.file in text
    assert "Fix: " in text
    assert "Traceback" not in text
    for word in item.words:
        assert word in text


def scanned(folder: Path, item: Any) -> tuple[Any, Any]:
    options = {"resolution": 64, "max_skipped": 1.0, "buckets": {"step": 16, "min": 16}} | item.options
    sets = scan([Config(path=folder, **options)])
    return sets[0], report_on(sets)


def findings_of(report: Any, *kinds: str) -> str:
    return "\n".join(str(finding.problem) for finding in report.datasets[0].of(*kinds))


def test_the_corpus_is_large_enough() -> None:
    items = [*CORPUS.PICTURES, *CORPUS.CAPTIONS, *CORPUS.TREES, *CORPUS.CONFIGS, *CORPUS.WEIGHTS]
    assert len(items) >= 130
    assert len(set(names(items))) == len(items)


@pytest.mark.parametrize("item", [*CORPUS.PICTURES, *CORPUS.CAPTIONS], ids=names([*CORPUS.PICTURES, *CORPUS.CAPTIONS]))
def test_pictures_and_captions(item: Any, tmp_path: Path) -> None:
    for number in range(NUM_GOOD):
        CORPUS.good(tmp_path / f"good{number}.png")
    item.make(tmp_path)
    found, report = scanned(tmp_path, item)
    used = {one.record.key for one in found.items}
    expected_good = NUM_GOOD if "max_pixels" not in item.options else 0
    assert len([key for key in used if key.startswith("good")]) == expected_good
    is_used = any(not key.startswith("good") for key in used)
    if item.outcome == "used":
        assert is_used
        assert findings_of(report, "skipped", "error") == ""
        for word in item.words:
            assert word in findings_of(report, "warning")
    else:
        assert not is_used
        lines = [line for line in findings_of(report, item.outcome).splitlines() if item.file in line]
        assert lines
        check_message(lines[0], item)
        assert report.is_startable == (item.outcome == "skipped" and expected_good > 0)


def test_captions_reach_training_as_text(tmp_path: Path) -> None:
    """What the odd encodings decode to."""
    expected = {"caption: latin-1, and said so": "café", "caption: utf-8 with mark": "a cat", "caption: utf-16 with mark": "a cat"}
    expected |= {"caption: utf-16 without mark": "a cat", "caption: empty": "", "caption: several lines": "one\ntwo\nthree"}
    for number, item in enumerate(item for item in CORPUS.CAPTIONS if item.name in expected):
        folder = tmp_path / str(number)
        folder.mkdir()
        item.make(folder)
        assert scanned(folder, item)[0].items[0].caption == expected[item.name]


@pytest.mark.parametrize("item", CORPUS.TREES, ids=names(CORPUS.TREES))
def test_trees(item: Any, tmp_path: Path) -> None:
    item.make(tmp_path)
    if item.outcome == "used":
        found, report = scanned(tmp_path / "set", item)
        assert found.items
        assert report.is_startable
        assert all(line.isprintable() for line in report.warnings())
        for word in item.words:
            assert word in findings_of(report, "warning")
        return
    with pytest.raises(FluxsmithError) as caught:
        scanned(tmp_path / "set", item)[1].raise_if_unusable()
    assert caught.value.exit_code == item.outcome
    check_message("\n".join(caught.value.lines()), item)


@pytest.mark.parametrize("item", CORPUS.CONFIGS, ids=names(CORPUS.CONFIGS))
def test_configs(item: Any, tmp_path: Path) -> None:
    item.make(tmp_path)
    with pytest.raises(FluxsmithError) as caught:
        load_config(tmp_path / item.file)
    assert caught.value.exit_code == item.outcome
    check_message("\n".join(caught.value.lines()), item)


@pytest.mark.parametrize("item", CORPUS.WEIGHTS, ids=names(CORPUS.WEIGHTS))
def test_weights(item: Any, tmp_path: Path) -> None:
    item.make(tmp_path)
    with pytest.raises(FluxsmithError) as caught:
        require_role(tmp_path / item.options.get("open", item.file), item.options["role"])
    assert caught.value.exit_code == item.outcome
    check_message("\n".join(caught.value.lines()), item)
