"""The header of a GGUF file (llama.cpp's and ComfyUI-GGUF's format, versions 2 and 3), checked before anything is read; no torch here.

`read_gguf("flux1-dev-Q4_K_S.gguf").tensors["img_in.weight"].dtype` is "Q4_K"; T5's llama.cpp names come out as Hugging Face's.
Layout: magic, version, counts; key-value pairs; tensors (name, sides innermost first, kind, place); padding; data.
"""

import os
import re
import struct
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

from fluxsmith.errors import ModelFileError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
KINDS: dict[int, tuple[str, int, int]] = {  # number -> name, values in a block, bytes of a block
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 30: ("BF16", 1, 2),
}  # fmt: skip
QUANTISED = tuple(name for name, values, _ in KINDS.values() if values > 1)
PLAIN_VALUES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # kind of a value -> bytes
TEXT, ROW, NUMBER = 8, 9, 4
MAX_PAIRS, MAX_TENSORS, MAX_NAME, MAX_SIDES, MAX_TEXTS = 10_000, 20_000, 512, 8, 5_000_000
T5_LAYERS = {
    "attn_q": "layer.0.SelfAttention.q", "attn_k": "layer.0.SelfAttention.k", "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o", "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias", "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0", "ffn_up": "layer.1.DenseReluDense.wi_1", "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}  # fmt: skip
T5_OUTER = {"token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight"}
T5_BLOCK = re.compile(r"enc\.blk\.(\d+)\.(\w+)\.weight")


class Entry(NamedTuple):
    """One tensor: shape outermost first, bytes from the start of the data."""

    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


class Contents(NamedTuple):
    """All of the header that matters."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    data_offset: int


class _Cursor:
    """Numbers and texts one after the other, never beyond the end of the file."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size = file, size

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.size else b""
        if len(data) != count:
            raise ValueError("it ends inside its header")
        return data

    def skip(self, count: int) -> None:
        if self.file.tell() + count > self.size:
            raise ValueError("it ends inside its header")
        self.file.seek(count, os.SEEK_CUR)

    def number(self, form: str) -> int:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]

    def text(self, limit: int) -> str:
        length = self.number("Q")
        if length > limit:
            raise ValueError(f"a name of {length} bytes")
        return self.take(length).decode("utf-8")

    def value(self, kind: int) -> str | int | None:
        """A text or a plain number; rows and everything else are passed over."""
        if kind == TEXT:
            length = self.number("Q")
            if length <= MAX_NAME:
                return self.take(length).decode("utf-8", "replace")
            self.skip(length)
        elif kind == ROW:
            self.row()
        elif kind == NUMBER:
            return self.number("I")
        elif kind in PLAIN_VALUES:
            self.skip(PLAIN_VALUES[kind])
        else:
            raise ValueError(f"a value of unknown kind {kind}")
        return None

    def row(self) -> None:
        kind, count = self.number("I"), self.number("Q")
        if kind == TEXT and count <= MAX_TEXTS:
            for _ in range(count):
                self.skip(self.number("Q"))
        elif kind in PLAIN_VALUES:
            self.skip(count * PLAIN_VALUES[kind])
        else:
            raise ValueError(f"a row of unknown kind {kind}")


def is_gguf(path: Path) -> bool:
    """By its first bytes, or its name."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> Contents:
    """Read and check the header. Raises ModelFileError; OSError where the file cannot be opened."""
    with path.open("rb") as file:
        cursor = _Cursor(file, path.stat().st_size)
        try:
            return _contents(cursor)
        except (ValueError, struct.error) as error:
            what = "this is not a GGUF file that can be read"
            raise ModelFileError(what, where=str(path), why=str(error)[:200], fix="download or copy the file again") from error


def _contents(cursor: _Cursor) -> Contents:
    if cursor.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise ValueError(f"GGUF version {version}, known are 2 and 3")
    count, pairs = cursor.number("Q"), cursor.number("Q")
    if count > MAX_TENSORS or pairs > MAX_PAIRS:
        raise ValueError(f"{count} tensors and {pairs} values are too many")
    values: dict[str, Any] = {}
    for _ in range(pairs):
        name = cursor.text(1 << 16)
        values[name] = cursor.value(cursor.number("I"))
    found = [_tensor(cursor) for _ in range(count)]
    unit = values.get("general.alignment") or 32
    if not isinstance(unit, int) or unit & (unit - 1):
        raise ValueError(f"an alignment of {unit}")
    offset = -(-cursor.file.tell() // unit) * unit
    tensors = {_t5_name(name): entry for name, entry in found}
    if len(tensors) != count:
        raise ValueError("a tensor is there twice")
    _check_places(tensors, cursor.size - offset, unit)
    texts = {name: value for name, value in values.items() if isinstance(value, str) and name.startswith("general.")}
    return Contents(tensors, texts, offset)


def _tensor(cursor: _Cursor) -> tuple[str, Entry]:
    name, count = cursor.text(MAX_NAME), cursor.number("I")
    if count > MAX_SIDES:
        raise ValueError(f"{name} has {count} sides")
    sides = [cursor.number("Q") for _ in range(count)]
    number, start = cursor.number("I"), cursor.number("Q")
    if number not in KINDS:
        raise ValueError(f"{name} is stored in a form (number {number}) that is not known")
    kind, values, size = KINDS[number]
    if (sides[0] if sides else 1) % values or any(side >= 1 << 48 for side in sides):
        raise ValueError(f"{name} has rows that {kind} cannot hold")
    return name, Entry(kind, tuple(reversed(sides)), start, start + prod(sides) // values * size)


def _check_places(tensors: dict[str, Entry], stored: int, unit: int) -> None:
    place = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if entry.start % unit or entry.start < place or entry.end > stored:
            raise ValueError(f"{name} lies outside of the file" if entry.end > stored else f"{name} lies over another tensor")
        place = entry.end


def _t5_name(name: str) -> str:
    """llama.cpp's names of T5's encoder as the published file's; others stay."""
    found = T5_BLOCK.fullmatch(name)
    if found and found[2] in T5_LAYERS:
        return f"encoder.block.{found[1]}.{T5_LAYERS[found[2]]}.weight"
    return T5_OUTER.get(name, name)
