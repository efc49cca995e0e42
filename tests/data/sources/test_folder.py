"""The folder source: what is listed, in which order, with which captions; odd trees and odd names."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fluxsmith.data.sources.base import Listing, decode_caption, shown
from fluxsmith.data.sources.folder import PICTURES, Config
from fluxsmith.errors import DataError


def put(path: Path, caption: str | bytes | None = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not decoded here")
    if caption is not None:
        data = caption if isinstance(caption, bytes) else caption.encode()
        path.with_suffix(".txt").write_bytes(data)
    return path


def listing(folder: Path, **options: Any) -> Listing:
    return Config(path=folder, **options).build().listing()


def keys(folder: Path, **options: Any) -> list[str]:
    return [record.key for record in listing(folder, **options).records]


def test_all_picture_endings_in_any_case(tmp_path: Path) -> None:
    names = [f"a{place}{ending.upper() if place % 2 else ending}" for place, ending in enumerate(PICTURES)]
    for name in [*names, "notes.md", "b.txt", "c.safetensors"]:
        put(tmp_path / name)
    assert keys(tmp_path) == sorted(names)


def test_records_are_sorted_by_the_bytes_of_their_names(tmp_path: Path) -> None:
    names = ["b.png", "a.png", "B.png", "a/c.png", "a-b.png", "é.png", "10.png", "9.png", "日本.png"]
    for name in names:
        put(tmp_path / name)
    assert keys(tmp_path, recursive=True) == sorted(names, key=lambda name: name.encode())
    assert keys(tmp_path) == sorted((name for name in names if "/" not in name), key=lambda name: name.encode())


@pytest.mark.ledger("KS-41")
def test_captions_are_looked_for_in_the_order_of_the_extensions(tmp_path: Path) -> None:
    put(tmp_path / "a.png", None)
    (tmp_path / "a.caption").write_text("second")
    assert listing(tmp_path).records[0].caption == "second"
    (tmp_path / "a.txt").write_text("first")
    assert listing(tmp_path).records[0].caption == "first"
    assert listing(tmp_path, captions={"extensions": [".caption"]}).records[0].caption_path == tmp_path / "a.caption"
    assert listing(tmp_path, captions={"extensions": [".cap"]}).records[0].caption is None


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"plain", "plain"),
        (b"\xef\xbb\xbfmarked", "marked"),
        ("é日".encode("utf-16"), "é日"),
        ("é日".encode("utf-16-be").join([b"\xfe\xff", b""]), "é日"),
        ("é".encode("utf-32"), "é"),
        (b"a\r\nb\rc\n", "a\nb\nc"),
        (b" a\x00b ", "ab"),
        (b"", ""),
    ],
)
def test_caption_encodings(data: bytes, text: str) -> None:
    assert decode_caption(data, "utf-8") == text


def test_a_caption_that_cannot_be_decoded_is_a_problem_with_file_and_offset(tmp_path: Path) -> None:
    put(tmp_path / "a.png", b"abc\xe9def")
    put(tmp_path / "b.png")
    found = listing(tmp_path)
    assert [record.key for record in found.records] == ["b.png"]
    key, problem = found.problems[0]
    assert key == "a.png"
    assert "a.txt" in problem.where
    assert "byte 3 (0xe9)" in problem.why
    assert "captions.encoding" in problem.fix
    assert listing(tmp_path, captions={"encoding": "latin-1"}).records[0].caption == "abcédef"


def test_odd_names_are_taken_as_they_are(tmp_path: Path) -> None:
    names = ["-dash.png", "new\nline.png", "per%20cent.png", "a" * 200 + ".png", "two.dots.png", "sp ace.png", "q'uote\".png"]
    for name in names:
        put(tmp_path / name, name)
    raw = os.fsencode(tmp_path) + b"/b\xff.png"
    Path(os.fsdecode(raw)).write_bytes(b"x")
    found = {record.key: record.caption for record in listing(tmp_path).records}
    assert {name: found[name] for name in names} == {name: name.strip() for name in names}
    assert shown(os.fsdecode(b"b\xff.png")) == "b\\xff.png"
    assert shown("new\nline\x1b[31m.png") == "new\\nline\\x1b[31m.png"


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    put(folder / "sub" / "a.png")
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "again").symlink_to(folder / "sub")
    (folder / "one.png").symlink_to(folder / "sub" / "a.png")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "self.png").symlink_to(folder / "self.png")
    found = listing(folder, recursive=True)
    assert [record.key for record in found.records] == ["again/a.png", "one.png"]
    assert sorted(key for key, _ in found.problems) == ["gone.png", "self.png"]


@pytest.mark.timeout(10)
def test_pipes_and_sockets_are_named_once_and_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    os.mkfifo(tmp_path / "a.caption")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("c.png")
        found = listing(tmp_path)
    assert [record.key for record in found.records] == ["a.png"]
    assert len(found.warnings) == 1
    assert "b.png" in found.warnings[0]
    assert "c.png" in found.warnings[0]


def test_folders_below_the_limit_are_not_read(tmp_path: Path) -> None:
    deep = tmp_path
    for level in range(40):
        deep = deep / f"d{level}"
        put(deep / "a.png")
    found = listing(tmp_path, recursive=True)
    assert len(found.records) == 33 - 1
    assert "32 folders deep" in found.warnings[0]


def test_hidden_pictures_are_named(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "._a.png")
    put(tmp_path / ".cache" / "b.png")
    found = listing(tmp_path, recursive=True)
    assert [record.key for record in found.records] == ["a.png"]
    assert "._a.png" in found.warnings[0]


def test_a_number_in_the_folder_name_is_explained(tmp_path: Path) -> None:
    put(tmp_path / "10_cat" / "a.png")
    assert "repeats = 10" in listing(tmp_path / "10_cat").warnings[0]
    assert "repeats = 10" in listing(tmp_path, recursive=True).warnings[0]
    put(tmp_path / "cats" / "a.png")
    assert listing(tmp_path / "cats").warnings == ()


def test_shared_stems_are_named(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "a.jpg")
    assert "a.jpg = a.png" in listing(tmp_path).warnings[0]


def test_folders_that_cannot_be_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not found"):
        listing(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder is empty"):
        listing(tmp_path / "empty")
    put(tmp_path / "sub" / "deeper" / "a.png")
    put(tmp_path / "sub" / "b.doc", None)
    with pytest.raises(DataError, match=r"1 in sub-folders.*recursive = true"):
        listing(tmp_path / "sub")
    put(tmp_path / "docs" / "b.doc", None)
    with pytest.raises(DataError, match=r"\.doc"):
        listing(tmp_path / "docs")
    with pytest.raises(DataError, match="is a file"):
        listing(tmp_path / "sub" / "b.doc")


def test_the_name_is_the_folders(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert Config(path=tmp_path).build().name == tmp_path.name
    assert Config(path=tmp_path, name="cats").build().name == "cats"


@pytest.mark.ledger("KS-41")
def test_a_name_with_a_face_shares_the_caption_of_the_name(tmp_path: Path) -> None:
    put(tmp_path / "cat_10_20_30_40.png", None)
    put(tmp_path / "sub" / "cat_10_20_30_40.png", None)
    put(tmp_path / "dog_10_20_30_40.png", "its own")
    put(tmp_path / "my_best_cat_of_all.png", None)
    for name, text in (("cat", "shared"), ("dog", "not this"), ("sub/cat", "below"), ("my", "not a face")):
        (tmp_path / f"{name}.txt").write_text(text)
    captions = {record.key: record.caption for record in listing(tmp_path, recursive=True).records}
    assert captions == {
        "cat_10_20_30_40.png": "shared",
        "dog_10_20_30_40.png": "its own",
        "my_best_cat_of_all.png": None,
        "sub/cat_10_20_30_40.png": "below",
    }
