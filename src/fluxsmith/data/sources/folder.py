"""Pictures in a folder, each with its caption in a text file of the same stem.

`{ type = "folder", path = "cats/", recursive = true }`
"""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fluxsmith.config.dataset import DatasetConfig
from fluxsmith.data.augment import name_without_face
from fluxsmith.data.sources.base import PICTURES, Listing, read_caption, shown
from fluxsmith.data.types import Record
from fluxsmith.errors import DataError, Problem

MAX_DEPTH = 32
_REPEATS_IN_NAME = re.compile(r"(\d+)_.+")


class Config(DatasetConfig):
    """A folder of pictures."""

    path: Path
    """The folder."""
    recursive: bool = False
    """Also take pictures from sub-folders."""

    def build(self) -> "FolderSource":
        """The source these options describe."""
        return FolderSource(self)


class _Found(NamedTuple):
    """One walk: regular files by folder, and what was passed over."""

    files: list[tuple[str, Path]]  # (key, path)
    odd: list[str]  # FIFOs, sockets, devices
    problems: list[tuple[str, Problem]]
    warnings: list[str]
    hidden: list[str]


class FolderSource:
    """Lists a folder; symbolic links are followed, each folder is entered once, hidden entries are left alone."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = config.path
        self.name = config.name or shown(self.path.resolve().name)

    def listing(self) -> Listing:
        """All pictures with their captions, sorted by the bytes of their relative paths."""
        root = self._root()
        found = _Found([], [], [], [], [])
        self._walk(root, "", found, set())
        files = dict(found.files)
        pictures = sorted((key for key in files if Path(key).suffix.lower() in PICTURES), key=os.fsencode)
        if not pictures and not found.problems:
            raise self._nothing(root, files)
        records, problems = [], list(found.problems)
        for key in pictures:
            record = self._record(key, files)
            if isinstance(record, Problem):
                problems.append((key, record))
            else:
                records.append(record)
        return Listing(tuple(records), tuple(problems), tuple(self._warnings(found, pictures)))

    def _root(self) -> Path:
        where = shown(self.path)
        if not self.path.exists():
            raise DataError("data folder not found", where=where, fix="check data.path")
        if not self.path.is_dir():
            raise DataError("data.path is a file, not a folder", where=where, fix=f"set data.path to {shown(self.path.parent)}")
        return self.path

    def _nothing(self, root: Path, files: dict[str, Path]) -> DataError:
        below = 0 if self.config.recursive else _count_below(root)
        if below:
            return DataError(
                f"no pictures, but {below} in sub-folders", where=shown(root), fix="set recursive = true, or name a sub-folder"
            )
        endings = sorted({Path(key).suffix.lower() or "(none)" for key in files})[:8]
        why = f"{len(files)} files with other endings: {', '.join(endings)}" if files else "the folder is empty"
        return DataError("no pictures found", where=shown(root), why=why, fix=f"add pictures ({' '.join(PICTURES)})")

    def _walk(self, folder: Path, prefix: str, found: _Found, seen: set[tuple[int, int]]) -> None:
        """Collect the files of one folder; `seen` holds (device, inode) of folders entered, so that link loops end."""
        here = folder.stat()
        if (here.st_dev, here.st_ino) in seen:
            return
        seen.add((here.st_dev, here.st_ino))
        if prefix.count("/") > MAX_DEPTH:
            found.warnings.append(f"{shown(folder)}: more than {MAX_DEPTH} folders deep, not read")
            return
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            found.problems.append((prefix, Problem("folder cannot be read", shown(folder), error.strerror or "", "check its permissions")))
            return
        for entry in entries:
            self._visit(entry, prefix, found, seen)

    def _visit(self, entry: "os.DirEntry[str]", prefix: str, found: _Found, seen: set[tuple[int, int]]) -> None:
        key, path = prefix + entry.name, Path(entry.path)
        is_picture = path.suffix.lower() in PICTURES
        if entry.name.startswith("."):
            if is_picture:
                found.hidden.append(key)
            return
        try:
            mode = entry.stat().st_mode  # of the target, when it is a link
        except OSError as error:
            if is_picture:
                found.problems.append((key, Problem("link leads nowhere", shown(path), error.strerror or "", "mend or delete the link")))
            return
        if stat.S_ISDIR(mode):
            if self.config.recursive:
                self._walk(path, key + "/", found, seen)
        elif stat.S_ISREG(mode):
            found.files.append((key, path))
        else:
            found.odd.append(key)

    def _record(self, key: str, files: dict[str, Path]) -> Record | Problem:
        """The record, or the problem of its caption file. The first of `captions.extensions` that exists is the caption.

        A picture named `NAME_cx_cy_w_h` (where its face is) may share the caption of `NAME`.
        """
        stem = key[: len(key) - len(Path(key).suffix)]
        folder, slash, name = stem.rpartition("/")
        shared = name_without_face(name)
        for beginning in (stem, f"{folder}{slash}{shared}") if shared else (stem,):
            for extension in self.config.captions.extensions:
                path = files.get(beginning + extension)
                if path is None:
                    continue
                caption = read_caption(path, self.config.captions.encoding)
                return caption if isinstance(caption, Problem) else Record(files[key], key, caption, path)
        return Record(files[key], key, None)

    def _warnings(self, found: _Found, pictures: list[str]) -> Iterator[str]:
        where = shown(self.path)
        yield from found.warnings
        if found.odd:
            yield f"{where}: {len(found.odd)} entries are no regular files (pipe, socket or device) and were not read: {_some(found.odd)}"
        if found.hidden:
            yield f"{where}: {len(found.hidden)} hidden pictures were not read (their names begin with a dot): {_some(found.hidden)}"
        stems: dict[str, list[str]] = {}
        for key in pictures:
            stems.setdefault(key[: len(key) - len(Path(key).suffix)], []).append(key)
        shared = [keys for keys in stems.values() if len(keys) > 1]
        if shared:
            names = _some(" = ".join(keys) for keys in shared)
            yield f"{where}: {len(shared)} names are shared by several pictures, which so share one caption: {names}"
        for name in sorted({self.path.resolve().name, *(part for key in pictures for part in key.split("/")[:-1])}):
            match = _REPEATS_IN_NAME.fullmatch(name)
            if match and int(match.group(1)) > 0:
                yield (
                    f"{where}: the number in the folder name {shown(name)} is not used; repeats come from `repeats` "
                    f"(now {self.config.repeats}). Fix: set repeats = {int(match.group(1))} if that was meant"
                )


def _count_below(root: Path) -> int:
    """Pictures in the folders directly below."""
    count = 0
    for folder in root.iterdir():
        if folder.is_dir() and not folder.name.startswith("."):
            count += sum(path.suffix.lower() in PICTURES for path in folder.iterdir())
    return count


def _some(names: "Iterator[str] | list[str]", limit: int = 5) -> str:
    names = [shown(name) for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
