"""Weights files without weights: a true header and nothing behind it (sparse), for what is decided by names and shapes alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path


def header_only(path: Path, shapes: Mapping[str, Sequence[int]], dtype: str = "BF16", bits: int = 16) -> Path:
    """A file of the right size with no data in it."""
    entries, place = {}, 0
    for name, shape in shapes.items():
        size = bits // 8
        for length in shape:
            size *= length
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)
    return path
