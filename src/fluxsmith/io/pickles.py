"""Weights that are published only as torch pickles (InstantX's and InfiniteYou's, Nexus-Gen's decoders), made safetensors once.

`readable(Path("ip-adapter.bin"))` -> ip-adapter.safetensors beside it. A restricted process of its own reads the pickle
(io/pickle_reader.py: no name but a tensor's is known there, nothing is executed); this program never does.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from fluxsmith.errors import FluxsmithError, ModelFileError, StorageError
from fluxsmith.io.durable import Disk, readable_size
from fluxsmith.io.header import PICKLE_ENDINGS, read_header
from fluxsmith.io.home import home
from fluxsmith.io.notices import Say, say
from fluxsmith.io.owner import temporary_name

MARK = "fluxsmith.converted_from"
READER = Path(__file__).with_name("pickle_reader.py")
EDGE = 1 << 20  # bytes read at both ends: the description, and the archive's table of contents with a sum of each tensor
SECONDS, BYTES_PER_SECOND = 120, 10 << 20


def is_pickle(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() in PICKLE_ENDINGS


def readable(path: Path, *, note: Say = say) -> Path:
    """The safetensors file that a pickle stands for, made now or earlier: beside it, or in fluxsmith's own folder where that cannot
    be written. Raises ModelFileError for anything but tensors, without an effect; StorageError where there is no room."""
    if not path.is_file():
        raise ModelFileError("file not found", where=str(path), fix="check the path")
    mark = fingerprint(path)
    places = (path.with_suffix(".safetensors"), home() / "converted" / f"{path.stem}-{mark[:16]}.safetensors")
    for place in places:
        if _mark_of(place) == mark:
            return place
    target = next((place for place in places if _is_free(place)), places[-1])
    convert(path, target, note=note)
    return target


def convert(path: Path, target: Path, *, note: Say = say) -> None:
    """Write `target` from a pickle, durably. Raises as `readable`."""
    disk = Disk()
    disk.make_folder(target.parent)
    size, free = path.stat().st_size, disk.free_bytes(target.parent)
    if size > free:
        why = f"{readable_size(size)} are needed, {readable_size(free)} are free"
        raise StorageError(f"no room to convert {path.name}", where=str(target.parent), why=why, fix="free some space")
    note(f"{path} is a Python pickle: its tensors are written once to {target}, in a process that can do nothing else")
    temporary = target.with_name(temporary_name(target.name))
    try:
        report = _run(path, temporary, {MARK: fingerprint(path), "format": "pt"})
        read_header(temporary)
        with temporary.open("rb") as written:
            disk.fsync(written.fileno(), temporary)
        disk.rename(temporary, target)
        disk.fsync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)
    if report.get("left"):
        note(f"{report['left']} entries of {path.name} are no tensors and were left out")


def fingerprint(path: Path) -> str:
    """What tells one pickle from another without reading all of it: size and both ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(f"{size}:".encode() + file.read(EDGE))
        file.seek(max(size - EDGE, 0))
        digest.update(file.read(EDGE))
    return digest.hexdigest()


def _run(path: Path, target: Path, metadata: Mapping[str, str]) -> dict[str, int]:
    words = [sys.executable, "-I", str(READER), str(path.absolute()), str(target.absolute()), json.dumps(metadata)]
    limit = SECONDS + path.stat().st_size // BYTES_PER_SECOND
    try:
        done = subprocess.run(words, capture_output=True, timeout=limit, check=False, env={}, cwd="/")  # noqa: S603  our own file
    except subprocess.TimeoutExpired as error:
        raise _refused(path, f"reading it took more than {limit} seconds") from error
    try:
        report = json.loads(done.stdout)
    except ValueError:
        report = {}
    if done.returncode or "tensors" not in report:
        raise _refused(path, str(report.get("refused", f"the process that read it was stopped ({done.returncode})")))
    return report


def _refused(path: Path, why: str) -> ModelFileError:
    fix = "get the .safetensors version of this model, and be wary of the file's source"
    return ModelFileError("this pickle is not converted; nothing of it was executed", where=str(path), why=why, fix=fix)


def _mark_of(place: Path) -> str:
    if not place.is_file():
        return ""
    try:
        return read_header(place).metadata.get(MARK, "")
    except FluxsmithError:
        return ""


def _is_free(place: Path) -> bool:
    """May the file be written: no file of somebody else's is there, and its folder lets us."""
    if place.exists() and not _mark_of(place):
        return False
    folder = next(folder for folder in place.parents if folder.is_dir())
    return os.access(folder, os.W_OK)
