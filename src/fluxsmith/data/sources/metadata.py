"""Pictures listed in a metadata file with their captions and tags, as the fine-tuning tools of sd-scripts write it.

`{ type = "metadata", metadata_file = "cats.json", path = "cats/" }` reads `{"a": {"caption": "a cat", "tags": "fur, red"}}`,
or a .jsonl file with one `{"image_path": "a.png", "caption": ...}` on each line.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fluxsmith.config.dataset import DatasetConfig
from fluxsmith.data.sources.base import PICTURES, Listing, shown
from fluxsmith.data.types import Record
from fluxsmith.errors import DataError, Problem

READ = ("caption", "tags", "image_size", "image_path")  # image_size is not needed: pictures are measured
LEFT = ("train_resolution",)  # written by the tools that make buckets
EXAMPLE = '{"name": {"caption": "a cat", "tags": "fur, red"}}'


class Config(DatasetConfig):
    """Pictures and captions from a metadata file."""

    metadata_file: Path
    """The metadata file, .json or .jsonl."""
    path: Path | None = None
    """Folder of the pictures; names in the file start there. By default the folder of the file."""

    def build(self) -> "MetadataSource":
        """The source these options describe."""
        return MetadataSource(self)


class _Entry(NamedTuple):
    """One picture as the file names it; `place` is the line, for messages."""

    name: str
    facts: Any
    place: str


class MetadataSource:
    """Lists what the file names; names without an ending find their picture."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.file = config.metadata_file
        self.path = config.path or config.metadata_file.parent
        self.name = config.name or shown(self.file.stem)
        self._stems: dict[Path, dict[str, list[Path]]] = {}

    def listing(self) -> Listing:
        """All pictures of the file, sorted by the bytes of their keys."""
        if not self.path.is_dir():
            raise DataError("data folder not found", where=shown(self.path), fix="check data.path")
        records: dict[str, Record] = {}
        problems: list[tuple[str, Problem]] = []
        unread: set[str] = set()
        for entry in self._entries():
            record = self._record(entry)
            if isinstance(record, Record) and record.key in records:
                what = f"{shown(entry.name)}: the picture is listed twice"
                record = Problem(what, entry.place, shown(record.path), "keep one of the entries")
            if isinstance(record, Problem):
                problems.append((entry.name, record))
                continue
            records[record.key] = record
            unread |= set(entry.facts) - {*READ, *LEFT}
        if not records and not problems:
            raise DataError("no pictures listed", where=shown(self.file), fix=f"write {EXAMPLE}")
        names = ", ".join(sorted(map(shown, unread)))
        warnings = (f"{shown(self.file)}: not read: {names} (read are: {', '.join(READ)})",) if unread else ()
        return Listing(tuple(records[key] for key in sorted(records, key=os.fsencode)), tuple(problems), warnings)

    def _entries(self) -> Iterator[_Entry]:
        """Raises DataError when the file is not what its name says."""
        where = shown(self.file)
        try:
            text = self.file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError("metadata file cannot be read", where=where, why=str(error), fix="check data.metadata_file") from error
        if self.file.suffix.lower() == ".jsonl":
            yield from self._lines(text)
            return
        found = _parsed(text, where)
        if not isinstance(found, dict):
            raise DataError("metadata is not an object of pictures", where=where, fix=f"write {EXAMPLE}, or name a list of lines .jsonl")
        for name, facts in found.items():
            yield _Entry(name, facts, where)

    def _lines(self, text: str) -> Iterator[_Entry]:
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            where = f"{shown(self.file)}:{number}"
            facts = _parsed(line, where)
            if not isinstance(facts, dict) or not isinstance(facts.get("image_path"), str):
                raise DataError("line names no picture", where=where, fix='write {"image_path": "a.png", "caption": "a cat"}')
            yield _Entry(facts["image_path"], facts, where)

    def _record(self, entry: _Entry) -> Record | Problem:
        caption = self._caption(entry)
        if isinstance(caption, Problem):
            return caption
        found = self._find(entry.name)
        if not found:
            fix = "correct the name, set data.path to the folder of the pictures, or delete the entry"
            return Problem(f"{shown(entry.name)}: picture not found", entry.place, f"looked in {shown(self.path)}", fix)
        if len(found) > 1:
            names = ", ".join(shown(path.name) for path in found)
            return Problem(f"{shown(entry.name)}: several pictures have this name", entry.place, names, "write the ending too")
        return Record(found[0], self._key(found[0]), caption, self.file)

    def _find(self, name: str) -> list[Path]:
        """The picture of a name; without an ending all that it may mean."""
        path = self.path / name  # an absolute name stays itself
        if path.suffix.lower() in PICTURES and path.is_file():
            return [path]
        if path.parent not in self._stems:
            stems: dict[str, list[Path]] = {}
            for found in sorted(path.parent.iterdir()) if path.parent.is_dir() else ():
                if found.suffix.lower() in PICTURES and found.is_file():
                    stems.setdefault(found.stem, []).append(found)
            self._stems[path.parent] = stems
        return self._stems[path.parent].get(path.name, [])

    def _key(self, path: Path) -> str:
        inside = path.is_relative_to(self.path)
        return (path.relative_to(self.path) if inside else path).as_posix()

    def _caption(self, entry: _Entry) -> str | None | Problem:
        """The caption with the tags behind it, on each of its lines; None when there is neither."""
        facts, name = entry.facts, shown(entry.name)
        if not isinstance(facts, dict):
            return Problem(f"{name}: entry is not an object", entry.place, "", f"write {EXAMPLE}")
        for key in ("caption", "tags"):
            if not isinstance(facts.get(key), str | None):
                return Problem(f"{name}: {key} is not a text", entry.place, repr(facts[key])[:60], f'write "{key}": "a, b"')
        caption, tags = facts.get("caption"), (facts.get("tags") or "").strip()
        if not tags:
            return caption
        lines = [line.strip() for line in (caption or "").splitlines() if line.strip()]
        return "\n".join(f"{line}{self.config.captions.separator}{tags}" for line in lines) or tags


def _parsed(text: str, where: str) -> Any:
    """Raises DataError."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except ValueError as error:
        raise DataError("metadata is not JSON", where=where, why=str(error), fix="correct it there") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names differ; Python would keep the last of equal ones."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f'"{name}" is there twice')
        found[name] = value
    return found
