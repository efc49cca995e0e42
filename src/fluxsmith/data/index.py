"""What earlier starts learned about each picture, so that an unchanged one is neither hashed nor decoded again.

A picture counts as unchanged while size, time of change and inode stay; `cache.verify` reads everything again.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from fluxsmith.data.types import Size
from fluxsmith.io.durable import Disk

FORMAT = 1
Stamp = tuple[int, int, int]  # size in bytes, mtime_ns, inode


class Known(NamedTuple):
    """One picture as it was last seen whole."""

    stamp: Stamp
    digest: str  # SHA-256 of the file
    size: Size  # upright, pixels
    caption: str = ""  # digest of the caption it had
    has_alpha: bool | None = None  # None: noted by a version that did not look


def stamp_of(path: Path) -> Stamp:
    """What changes when a file's content does, short of reading it."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


class PictureIndex:
    """The list, kept as JSON beside the caches. A missing or damaged list only costs the reading."""

    def __init__(self, path: Path | None, disk: Disk | None = None) -> None:
        self.path = path
        self.disk = disk or Disk()
        self.pictures: dict[str, Known] = {}
        self.packs: dict[str, Stamp] = {}  # cache files whose content was checked, by relative path
        self.seen: dict[str, Known] = {}  # what this start found
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["format"] != FORMAT:
                return
            self.pictures = {key: _known(row) for key, row in stored["pictures"].items()}
            self.packs = {key: (int(row[0]), int(row[1]), int(row[2])) for key, row in stored["packs"].items()}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):  # only a shortcut: read the pictures instead
            self.pictures, self.packs = {}, {}

    def before(self, path: Path) -> Known | None:
        """What was known of this picture when the index was opened."""
        return self.pictures.get(_key(path))

    def unchanged(self, path: Path) -> Known | None:
        """The known facts, when the file's stamp is the same."""
        known = self.before(path)
        return known if known is not None and known.stamp == stamp_of(path) else None

    def note(self, path: Path, known: Known) -> None:
        """Remember for the next start."""
        self.seen[_key(path)] = known

    def save(self) -> None:
        """Write the list; entries of other data sets stay."""
        if self.path is None:
            return
        pictures = {key: list(known) for key, known in (self.pictures | self.seen).items()}
        text = json.dumps({"format": FORMAT, "pictures": pictures, "packs": self.packs}, ensure_ascii=True)
        self.disk.mkdir(self.path.parent)
        self.disk.write_file(self.path, text.encode("ascii"))


def _key(path: Path) -> str:
    return os.path.abspath(path)


def _known(row: list[Any]) -> Known:
    stamp, digest, size, caption, *rest = row
    place = (int(stamp[0]), int(stamp[1]), int(stamp[2]))
    return Known(
        place, str(digest), Size(int(size[0]), int(size[1])), str(caption), bool(rest[0]) if rest and rest[0] is not None else None
    )
