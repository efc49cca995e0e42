"""A header is believed only when it names every byte once; everything else is refused with the file's name and a cure."""

import json
from pathlib import Path

import pytest

from fluxsmith.errors import ModelFileError
from fluxsmith.io.header import MAX_TENSORS, read_header


def write(path: Path, header: object, data: bytes = b"", *, pad: int = 0) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) + pad).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape if shape is not None else [end - start], "data_offsets": [start, end]}


def test_reads_a_header(tmp_path: Path) -> None:
    head = {"__metadata__": {"a": "b"}, "y": entry(4, 12, [2, 2], "F16"), "x": entry(0, 4), "none": entry(12, 12, [0], "F32")}
    header = read_header(write(tmp_path / "a.safetensors", head, bytes(12)))
    assert list(header.tensors) == ["y", "x", "none"]
    assert header.tensors["y"].shape == (2, 2)
    assert header.tensors["y"].size == 8
    assert header.metadata == {"a": "b"}
    assert header.path.read_bytes()[header.data_offset :] == bytes(12)


BROKEN = {
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6), "overlap at 'b'"),
    "gap": ({"a": entry(0, 4), "b": entry(5, 6)}, bytes(6), "gap at 'b'"),
    "starts late": ({"a": entry(2, 6)}, bytes(6), "gap at 'a'"),
    "truncated": ({"a": entry(0, 40)}, bytes(30), "10 are missing"),
    "bytes left over": ({"a": entry(0, 4)}, bytes(6), "belong to no tensor"),
    "duplicate": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"1",
        "twice",
    ),
    "dtype": ({"a": entry(0, 4, [4], "Q9")}, bytes(4), "unknown dtype"),
    "shape and size": ({"a": entry(0, 4, [5])}, bytes(4), "needs 5 bytes"),
    "negative side": ({"a": entry(0, 4, [-4])}, bytes(4), "shape must be"),
    "bool side": ({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, bytes(1), "shape must be"),
    "offsets reversed": ({"a": entry(4, 0, [4])}, bytes(4), "needs 4 bytes"),
    "float offset": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0.0, 1]}}, bytes(1), "data_offsets must be"),
    "entry is a list": ({"a": [1]}, b"", "must have dtype"),
    "extra field": ({"a": {**entry(0, 1), "x": 1}}, bytes(1), "must have dtype"),
    "not JSON": (b"{nope", b"", "not valid"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not valid"),
    "not an object": ([1, 2], b"", "not a JSON object"),
    "NaN": (b'{"a": NaN}', b"", "not a JSON number"),
    "deep nesting": (b"[" * 100_000, b"", "not valid"),
    "metadata number": ({"__metadata__": {"a": 1}}, b"", "table of texts"),
    "metadata size": ({"__metadata__": {"a": "x" * 1_000_001}}, b"", "1000002 bytes"),
    "long name": ({"n" * 600: entry(0, 1)}, bytes(1), "600 characters"),
    "many tensors": ({f"t{i}": entry(0, 0) for i in range(MAX_TENSORS + 1)}, b"", "20001 tensors"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_headers_are_refused_by_name(tmp_path: Path, name: str) -> None:
    head, data, message = BROKEN[name]
    path = write(tmp_path / "weights.safetensors", head, data)
    with pytest.raises(ModelFileError) as caught:
        read_header(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("length", [0x0280, 0x4B50, 0x80])
def test_a_length_that_looks_like_another_format(tmp_path: Path, length: int) -> None:
    text = json.dumps({"a": entry(0, 1)}).encode()
    path = write(tmp_path / "a.safetensors", text + b" " * (length - len(text)), b"1")
    assert list(read_header(path).tensors) == ["a"]


def test_header_longer_than_the_file_or_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"a": entry(0, 1)}, b"1", pad=1000)
    with pytest.raises(ModelFileError, match="truncated inside its header"):
        read_header(path)
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"x")
    with pytest.raises(ModelFileError, match="not a safetensors file"):
        read_header(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.ckpt", b"x" * 100, "pickle"),
        ("a.BIN", b"x" * 100, "pickle"),
        ("a.gguf", b"x" * 100, "GGUF"),
        ("a.safetensors", b"GGUF" + bytes(100), "GGUF"),
        ("b.safetensors", b"PK\x03\x04" + bytes(100), "pickle"),
        ("c.safetensors", b"\x80\x02\x8a\x0a" + bytes(100), "pickle"),
        ("d.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS"),
        ("e.safetensors", b"", "too short"),
        ("f.safetensors", b"{}", "too short"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=message) as caught:
        read_header(tmp_path / name)
    assert "Fix:" in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="file not found"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_header(tmp_path)


def test_reading_a_header_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, fluxsmith.io.header; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
