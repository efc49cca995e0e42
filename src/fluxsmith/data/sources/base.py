"""What a dataset source answers: the records it found, what it could not use, and what the user should know.

A source's `Config` (a `DatasetConfig` with its own keys) has `build() -> Source`; `Source.listing()` reads names and captions, no pictures.
"""

import codecs
from pathlib import Path
from typing import NamedTuple, Protocol

from fluxsmith.data.types import Record
from fluxsmith.errors import Problem

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
MARKS = (  # longest first: the UTF-32 mark begins with the UTF-16 one
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Listing(NamedTuple):
    """`problems` are entries that were meant to be samples and cannot be (key, problem); `warnings` concern the whole source."""

    records: tuple[Record, ...]
    problems: tuple[tuple[str, Problem], ...] = ()
    warnings: tuple[str, ...] = ()


class Source(Protocol):
    """Where records come from."""

    name: str

    def listing(self) -> Listing:
        """All records, sorted by the bytes of their keys. Raises DataError when there is nothing to read."""
        ...


def shown(name: str | Path) -> str:
    """A file name fit for one line of a terminal or a log: undecodable bytes and control characters are escaped."""
    text = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def decode_caption(data: bytes, encoding: str) -> str:
    """The text of a caption file: a byte order mark decides, else `encoding`; line ends become newlines.

    Raises UnicodeDecodeError, whose `start` is the offset of the first bad byte.
    """
    for mark, marked in MARKS:
        if data.startswith(mark):
            encoding = marked
            break
    text = data.decode(encoding)
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "").strip()


def read_caption(path: Path, encoding: str) -> str | Problem:
    """The caption in a file, or what is wrong with the file."""
    try:
        return decode_caption(path.read_bytes(), encoding)
    except UnicodeDecodeError as error:
        why = f"byte {error.start} (0x{error.object[error.start]:02x}) is not {encoding}" if error.object else str(error)
        return Problem("caption cannot be decoded", shown(path), why, "save the file as UTF-8, or set captions.encoding")
    except OSError as error:
        return Problem("caption cannot be read", shown(path), error.strerror or str(error), "check the file and its permissions")
