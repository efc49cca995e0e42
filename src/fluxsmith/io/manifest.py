"""Reading what `durable.Disk.folder` wrote: is this folder complete, and which is the newest that is?

`verify_folder(run / "step-000500").extra["step"]`
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fluxsmith.errors import FluxsmithError, ModelFileError, Problem

CHUNK = 8 << 20  # bytes read at a time
MANIFEST = "MANIFEST.json"
MANIFEST_FORMAT = 1
USE_OLDER = "use an older checkpoint"


class FileRecord(NamedTuple):
    """What was written: bytes and SHA-256 (hex)."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A complete folder: its files and what the writer noted beside them."""

    path: Path
    files: dict[str, FileRecord]
    extra: dict[str, Any] = field(default_factory=dict)


class Newest(NamedTuple):
    """The newest complete folder, and why newer ones were passed over."""

    manifest: Manifest | None
    passed_over: tuple[Problem, ...]


def hash_file(path: Path) -> FileRecord:
    """Size and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def read_manifest(path: Path) -> Manifest:
    """MANIFEST.json of a folder, its files not yet checked. Raises ModelFileError."""
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): FileRecord(int(entry["size"]), str(entry["sha256"])) for name, entry in content["files"].items()}
        extra, version = dict(content["extra"]), content["format"]
    except FileNotFoundError as error:
        raise ModelFileError("incomplete: it has no MANIFEST.json", where=str(path), fix=USE_OLDER) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError("its MANIFEST.json is damaged", where=str(path), why=str(error)[:200], fix=USE_OLDER) from error
    if version != MANIFEST_FORMAT:
        raise ModelFileError(f"MANIFEST.json has format {version}, {MANIFEST_FORMAT} was expected", where=str(path), fix="update fluxsmith")
    return Manifest(path, files, extra)


def verify_folder(path: Path, *, hashes: bool = True) -> Manifest:
    """Every file of the manifest is there with its size (and SHA-256, unless `hashes` is off). Raises ModelFileError."""
    manifest = read_manifest(path)
    for name, record in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise ModelFileError(f"incomplete: {name} is missing", where=str(path), fix=USE_OLDER)
        size = file.stat().st_size
        if size != record.size:
            why = f"{size} bytes, {record.size} were written"
            raise ModelFileError(f"damaged: {name} has another size", where=str(path), why=why, fix=USE_OLDER)
        if hashes and hash_file(file).sha256 != record.sha256:
            raise ModelFileError(f"damaged: {name} has another content (SHA-256)", where=str(path), fix=USE_OLDER)
    return manifest


def numbered_folders(parent: Path, prefix: str = "step-") -> list[tuple[int, Path]]:
    """Folders named prefix + digits, lowest number first: `[(480, run/step-000480), ...]`."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)")
    found = ((pattern.fullmatch(path.name), path) for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else ()
    return sorted((int(match[1]), path) for match, path in found if match)


def newest_complete(parent: Path, prefix: str = "step-", *, hashes: bool = True) -> Newest:
    """The folder with the highest number that verifies, by number and never by time stamps."""
    passed_over: list[Problem] = []
    for _, path in reversed(numbered_folders(parent, prefix)):
        try:
            return Newest(verify_folder(path, hashes=hashes), tuple(passed_over))
        except FluxsmithError as error:
            passed_over.extend(error.problems)
    return Newest(None, tuple(passed_over))
