"""The metadata source: names that find their pictures, tags behind captions, and what is wrong with a file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxsmith.data.sources.base import Listing
from fluxsmith.data.sources.metadata import Config
from fluxsmith.errors import DataError

pytestmark = pytest.mark.ledger("KS-41")


@pytest.fixture
def pictures(tmp_path: Path, picture: Callable[..., Path]) -> Path:
    for name in ("a.png", "b.jpg", "sub/c.png"):
        picture(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


def listing(folder: Path, entries: Any, name: str = "meta.json", **options: Any) -> Listing:
    text = entries if isinstance(entries, str) else json.dumps(entries)
    (folder.parent / name).write_text(text)
    return Config(metadata_file=folder.parent / name, path=folder, **options).build().listing()


def test_names_with_and_without_ending_find_their_pictures(pictures: Path) -> None:
    entries = {"b": {"caption": "B"}, "a.png": {"caption": "A"}, "sub/c": {"caption": "C"}}
    found = listing(pictures, entries)
    assert [(record.key, record.caption) for record in found.records] == [("a.png", "A"), ("b.jpg", "B"), ("sub/c.png", "C")]
    assert not found.problems


def test_full_paths_and_no_folder(pictures: Path) -> None:
    found = listing(pictures, {str(pictures / "a"): {"caption": "A"}, str(pictures / "b.jpg"): {"caption": "B"}})
    assert [record.key for record in found.records] == ["a.png", "b.jpg"]
    (pictures / "meta.json").write_text('{"a": {"caption": "A"}}')
    assert Config(metadata_file=pictures / "meta.json").build().listing().records[0].path == pictures / "a.png"


def test_tags_stand_behind_the_caption_on_each_line(pictures: Path) -> None:
    entries = {"a": {"caption": "one\ntwo", "tags": "x, y"}, "b": {"tags": "only"}, "sub/c": {}}
    assert [record.caption for record in listing(pictures, entries).records] == ["one,x, y\ntwo,x, y", "only", None]
    other = listing(pictures, entries, captions={"separator": "; "})
    assert other.records[0].caption == "one; x, y\ntwo; x, y"


def test_lines(pictures: Path) -> None:
    lines = [{"image_path": "a.png", "caption": "A", "image_size": [96, 96]}, {"image_path": str(pictures / "b.jpg"), "tags": "t"}]
    found = listing(pictures, "\n\n".join(json.dumps(line) for line in lines), "meta.jsonl")
    assert [(record.key, record.caption) for record in found.records] == [("a.png", "A"), ("b.jpg", "t")]
    with pytest.raises(DataError, match=r"meta.jsonl:2: line names no picture"):
        listing(pictures, '{"image_path": "a.png"}\n{"caption": "A"}', "meta.jsonl")


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ({"gone": {"caption": "x"}}, "picture not found"),
        ({"a": {"caption": 3}}, "caption is not a text"),
        ({"a": {"tags": ["x"]}}, "tags is not a text"),
        ({"a": "caption"}, "entry is not an object"),
        ({"a": {"caption": "1"}, "a.png": {"caption": "2"}}, "listed twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_entries_that_cannot_be_used_are_problems_with_a_cure(pictures: Path, entries: Any, what: str) -> None:
    ((_, problem),) = listing(pictures, {"b": {"caption": "fine"}} | entries).problems
    assert what in problem.what
    assert problem.fix
    assert "meta.json" in problem.where


def test_a_name_of_two_pictures_needs_its_ending(pictures: Path, picture: Callable[..., Path]) -> None:
    picture(pictures / "a.webp")
    assert "several pictures" in listing(pictures, {"a": {}}).problems[0][1].what
    assert listing(pictures, {"a.webp": {}}).records[0].key == "a.webp"


@pytest.mark.parametrize(
    ("text", "what"), [("{", "not JSON"), ("[]", "not an object"), ("{}", "no pictures"), ('{"a":{},"a":{}}', "twice")]
)
def test_files_that_are_none(pictures: Path, text: str, what: str) -> None:
    with pytest.raises(DataError, match=what):
        listing(pictures, text)


def test_missing_file_and_folder(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.metadata_file"):
        Config(metadata_file=tmp_path / "gone.json", path=pictures).build().listing()
    with pytest.raises(DataError, match=r"data\.path"):
        Config(metadata_file=tmp_path / "gone.json", path=tmp_path / "gone").build().listing()


def test_fields_that_are_not_read_are_named(pictures: Path) -> None:
    (warning,) = listing(pictures, {"a": {"caption": "A", "train_resolution": [1, 1], "score": 3}}).warnings
    assert "not read: score" in warning


def test_a_run_trains_on_it(workshop: Any, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(json.dumps({"a": {"caption": "A", "tags": "t"}, "b": {"caption": "B"}, "sub/c": {"tags": "C"}}))
    config = Config(metadata_file=tmp_path / "meta.json", path=pictures, resolution=64, buckets={"step": 16})
    data = workshop.prepare(config)
    assert sorted(data.load(spec, step=0).captions[0] for spec in data.batches(0)) == ["A,t", "B", "C"]
