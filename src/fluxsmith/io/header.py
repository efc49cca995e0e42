"""The header of a weights file (safetensors; GGUF by io/gguf_header.py), checked before anything is mapped or allocated; no torch here.

A header that passes names every byte of the file exactly once: `read_header("flux1-dev.safetensors").tensors["img_in.weight"].shape`.
"""

import json
import os
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from fluxsmith.errors import ModelFileError
from fluxsmith.io.gguf_header import is_gguf, read_gguf

DTYPE_BITS: dict[str, int] = {  # in the order in which the safetensors library lays tensors out, smallest alignment first
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
MAX_HEADER_BYTES = 25_000_000
MAX_TENSORS = 20_000
MAX_NAME_LENGTH = 512
MAX_METADATA_BYTES = 1_000_000
MAX_DIMENSIONS = 16
PICKLE_ENDINGS = (".pt", ".ckpt", ".bin", ".pth", ".pkl")
DOWNLOAD_AGAIN = "download or copy the file again"
GET_SAFETENSORS = "get the .safetensors version of this model"


class TensorInfo(NamedTuple):
    """One tensor as the header names it; `start` and `end` are bytes from `Header.data_offset`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Stored bytes."""
        return self.end - self.start

    @property
    def elements(self) -> int:
        """Number of values."""
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A checked header; `tensors` keeps the file's order of names."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    data_offset: int = 0


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check one file's header. Raises ModelFileError that names the file, the finding and the cure."""
    path = Path(path)
    refuse_pickle(path)
    try:
        if is_gguf(path):
            found = read_gguf(path)
            return Header(path, {name: TensorInfo(*entry) for name, entry in found.tensors.items()}, found.metadata, found.data_offset)
        size = path.stat().st_size
        with path.open("rb") as file:
            length_bytes = file.read(8)
            _check_start(path, length_bytes, size)
            length = int.from_bytes(length_bytes, "little")
            text = file.read(length)
    except FileNotFoundError as error:
        raise ModelFileError("file not found", where=str(path), fix="check the path") from error
    except OSError as error:
        raise ModelFileError("file cannot be read", where=str(path), why=str(error), fix="check that it is a readable file") from error
    if len(text) < length:
        raise ModelFileError("file is truncated inside its header", where=str(path), fix=DOWNLOAD_AGAIN)
    tensors, metadata = _parse(path, text)
    _check_cover(path, tensors, size - 8 - length, size)
    return Header(path, tensors, metadata, 8 + length)


def refuse_pickle(path: Path) -> None:
    """Pickles can run code and are never opened here (io/pickles.py converts those that are named)."""
    ending = path.suffix.lower()
    if ending in PICKLE_ENDINGS:
        raise ModelFileError(
            f"{ending} files are Python pickles, which can run code when opened, and are not read",
            where=str(path),
            fix=GET_SAFETENSORS,
        )


def _check_start(path: Path, length_bytes: bytes, size: int) -> None:
    if len(length_bytes) < 8:
        raise ModelFileError(f"file is too short to be safetensors ({size} bytes)", where=str(path), fix=DOWNLOAD_AGAIN)
    length = int.from_bytes(length_bytes, "little")
    if length > MAX_HEADER_BYTES:
        what, fix = _other_format(length_bytes)
        why = f"its first 8 bytes give a header of {length} bytes, at most {MAX_HEADER_BYTES} are allowed"
        raise ModelFileError(what, where=str(path), why=why, fix=fix)
    if length + 8 > size:
        why = f"the header needs {length + 8} bytes, the file has {size}"
        raise ModelFileError("file is truncated inside its header", where=str(path), why=why, fix=DOWNLOAD_AGAIN)


def _other_format(start: bytes) -> tuple[str, str]:
    """What a file is whose first bytes are no header length; only then, since 0x80 may begin a length too."""
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "this is a Python pickle, which is not read", GET_SAFETENSORS
    if start.startswith(b"version "):
        return "this is a Git LFS pointer, not the file itself", "run `git lfs pull`"
    return "this is not a safetensors file", "check that the path names a safetensors file"


def _parse(path: Path, text: bytes) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ModelFileError("header is not valid", where=str(path), why=str(error)[:200], fix=DOWNLOAD_AGAIN) from error
    if not isinstance(entries, dict):
        raise ModelFileError("header is not a JSON object", where=str(path), fix=DOWNLOAD_AGAIN)
    metadata = _check_metadata(path, entries.pop("__metadata__", None))
    if len(entries) > MAX_TENSORS:
        raise ModelFileError(f"header names {len(entries)} tensors, at most {MAX_TENSORS} are allowed", where=str(path))
    return {name: _check_entry(path, name, entry) for name, entry in entries.items()}, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {twice[:100]!r} is there twice")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _check_metadata(path: Path, metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelFileError("metadata is not a table of texts", where=str(path), fix=DOWNLOAD_AGAIN)
    size = sum(len(key.encode("utf-8", "replace")) + len(value.encode("utf-8", "replace")) for key, value in metadata.items())
    if size > MAX_METADATA_BYTES:
        raise ModelFileError(f"metadata has {size} bytes, at most {MAX_METADATA_BYTES} are allowed", where=str(path))
    return metadata


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _check_entry(path: Path, name: str, entry: Any) -> TensorInfo:
    def refuse(why: str) -> ModelFileError:
        return ModelFileError(f"header entry {name[:100]!r} is not valid", where=str(path), why=why, fix=DOWNLOAD_AGAIN)

    if len(name) > MAX_NAME_LENGTH:
        raise refuse(f"a name of {len(name)} characters, at most {MAX_NAME_LENGTH} are allowed")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse("it must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise refuse(f"unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_count(side) for side in shape):
        raise refuse("shape must be a list of whole numbers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise refuse("data_offsets must be two whole numbers")
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise refuse(f"{dtype} {shape} needs {bits / 8:g} bytes, data_offsets give {offsets[1] - offsets[0]}")
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _check_cover(path: Path, tensors: dict[str, TensorInfo], stored: int, file_size: int) -> None:
    """Every data byte belongs to exactly one tensor."""
    place = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if info.start != place:
            kind = "overlap" if info.start < place else "leave a gap"
            raise ModelFileError(f"tensors {kind} at {name[:100]!r} (byte {place})", where=str(path), fix=DOWNLOAD_AGAIN)
        place = info.end
    if place > stored:
        why = f"the header promises {file_size - stored + place} bytes, the file has {file_size}: {place - stored} are missing"
        raise ModelFileError("file is truncated", where=str(path), why=why, fix=DOWNLOAD_AGAIN)
    if place < stored:
        why = f"the header promises {file_size - stored + place} bytes, the file has {file_size}"
        raise ModelFileError("file has bytes that belong to no tensor", where=str(path), why=why, fix=DOWNLOAD_AGAIN)
