"""Every write that must survive a kill, a full disk or a power cut: temp name, fsync, rename, fsync of the folder.

`with Disk().folder(run / "step-000500", extra={"step": 500}) as folder: disk.write_text(folder / "state.json", text)`
All primitive operations are methods of `Disk` and call `tick` first, so that tests can stop, fail or record any of them.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fluxsmith.errors import FluxsmithError, StorageError
from fluxsmith.io.manifest import (
    CHUNK,
    MANIFEST,
    MANIFEST_FORMAT,
    FileRecord,
    Manifest,
    hash_file,
    newest_complete,
    numbered_folders,
    verify_folder,
)
from fluxsmith.io.owner import RunLock, alive, temporary_name, temporary_owner

__all__ = [
    "Disk",
    "FileRecord",
    "Manifest",
    "RunLock",
    "clean_temporary",
    "hash_file",
    "newest_complete",
    "numbered_folders",
    "readable_size",
    "storage_errors",
    "verify_folder",
]

Buffer = bytes | bytearray | memoryview
FULL = (errno.ENOSPC, errno.EDQUOT)
JOINED = 1 << 16  # bytes below which buffers are joined before they are written
NO_FALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV)


class Disk:
    """The real file system. Subclass and override `tick` (or a primitive) to crash, fail or record."""

    def __init__(self) -> None:
        self._open_folders: dict[Path, dict[str, FileRecord]] = {}

    def tick(self, operation: str, path: Path) -> None:
        """Called before every primitive operation, and as `half` in the middle of every data write. Does nothing."""

    # primitives: one system call each ------------------------------------------------------------------------------

    def create(self, path: Path) -> int:
        """A new file open for writing, mode 0666 & ~umask."""
        self.tick("create", path)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)

    def write(self, fd: int, path: Path, data: Buffer) -> None:
        """All of `data`, in two halves with a tick between."""
        self.tick("write", path)
        view = memoryview(data).cast("B")
        middle = len(view) // 2
        self._write_all(fd, view[:middle])
        self.tick("half", path)
        self._write_all(fd, view[middle:])

    def _write_all(self, fd: int, view: memoryview) -> None:
        while view:
            view = view[os.write(fd, view) :]

    def reserve(self, fd: int, path: Path, size: int) -> None:
        """Make sure that `size` bytes fit before the first is written; skipped where the file system cannot."""
        self.tick("reserve", path)
        if size and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(fd, 0, size)
            except OSError as error:
                if error.errno not in NO_FALLOCATE:
                    raise

    def fsync(self, fd: int, path: Path) -> None:
        """The file's content is on the medium."""
        self.tick("fsync", path)
        os.fsync(fd)

    def fsync_folder(self, path: Path) -> None:
        """The folder's entries are on the medium."""
        self.tick("fsync-folder", path)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Atomic replacement within one file system."""
        self.tick("rename", target)
        source.replace(target)

    def mkdir(self, path: Path) -> None:
        """The folder and its parents, no error when it is there."""
        self.tick("mkdir", path)
        path.mkdir(parents=True, exist_ok=True)

    def make_folder(self, path: Path) -> None:
        """`mkdir` that survives a power cut: the entries of new folders are on the medium too."""
        path = path.absolute()
        new = [folder for folder in (path, *path.parents) if not folder.exists()]
        with storage_errors(path, self):
            self.mkdir(path)
            for folder in reversed(new):
                self.fsync_folder(folder.parent)

    def remove(self, path: Path) -> None:
        """One file; no error when it is gone."""
        self.tick("remove", path)
        path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        """A folder with all that is in it; no error when it is gone."""
        self.tick("remove-tree", path)
        with suppress(FileNotFoundError):
            shutil.rmtree(path)

    def truncate(self, path: Path, size: int) -> None:
        """Cut a file to `size` bytes and make it durable."""
        with storage_errors(path, self):
            self.tick("truncate", path)
            with path.open("r+b") as file:
                file.truncate(size)
                self.fsync(file.fileno(), path)

    def free_bytes(self, path: Path) -> int:
        """Bytes free for us on the file system of `path` (or of its nearest existing parent)."""
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free

    # whole files ---------------------------------------------------------------------------------------------------

    def write_file(self, path: Path, data: Buffer | Iterable[Buffer], *, size: int | None = None) -> FileRecord:
        """Replace `path` atomically and durably; the old content stays whole until the new one is complete.

        `data` may be a stream of buffers (give `size` so that space is reserved). Inside an open `folder` the file is
        written in place, because the folder itself is the temporary thing. Raises StorageError.
        """
        path = path.absolute()
        inside = next((folder for folder in self._open_folders if path.is_relative_to(folder)), None)
        if isinstance(data, bytes | bytearray | memoryview):
            view = memoryview(data).cast("B")
            stream, size = iter((view,)), view.nbytes
        else:
            stream = iter(data)
        if inside is not None:
            with storage_errors(path, self, size):
                record = self._write_stream(path, stream, size)
            self._open_folders[inside][path.relative_to(inside).as_posix()] = record
            return record
        temporary = path.with_name(temporary_name(path.name))
        with storage_errors(path, self, size):
            try:
                record = self._write_stream(temporary, stream, size)
                self.rename(temporary, path)
            except Exception:
                with suppress(OSError):
                    self.remove(temporary)
                raise
            self.fsync_folder(path.parent)
        return record

    def write_bytes(self, path: Path, data: Buffer) -> FileRecord:
        """`write_file` for bytes."""
        return self.write_file(path, data)

    def write_text(self, path: Path, text: str) -> FileRecord:
        """`write_file` for UTF-8 text."""
        return self.write_file(path, text.encode("utf-8", "surrogateescape"))

    def write_json(self, path: Path, value: Any) -> FileRecord:
        """`write_file` for JSON with sorted keys, so that equal values give equal bytes."""
        return self.write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")

    def append_text(self, path: Path, text: str, *, durable: bool = False) -> None:
        """Add to the end (a log); a kill can leave the last line torn. `durable` also waits for the medium."""
        with storage_errors(path, self, len(text)):
            self.tick("append", path)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                self.write(fd, path, text.encode("utf-8", "surrogateescape"))
                if durable:
                    self.fsync(fd, path)
            finally:
                os.close(fd)

    def _write_stream(self, path: Path, data: Iterable[Buffer], size: int | None) -> FileRecord:
        digest, total = hashlib.sha256(), 0
        fd = self.create(path)
        try:
            if size is not None:
                self.reserve(fd, path, size)
            for chunk in _chunks(data):
                self.write(fd, path, chunk)
                digest.update(chunk)
                total += len(chunk)
            if size is not None and total != size:
                os.ftruncate(fd, total)
            self.fsync(fd, path)
        finally:
            os.close(fd)
        return FileRecord(total, digest.hexdigest())

    # whole folders -------------------------------------------------------------------------------------------------

    @contextmanager
    def folder(self, final: Path, *, extra: Mapping[str, Any] | None = None, size: int = 0) -> Iterator[Path]:
        """A folder that appears under its final name only when it is complete.

        Yields the temporary folder to write into (through this Disk, so that every file is synced and hashed on the way).
        On leaving, MANIFEST.json with `extra` and each file's size and SHA-256 is written last, then everything is made durable
        and renamed. `size` bytes are tried for before the first write. An error removes the temporary folder and nothing else.
        """
        final = final.absolute()
        temporary = final.with_name(temporary_name(final.name))
        with storage_errors(final, self, size):
            try:
                self.remove_tree(temporary)
                self.mkdir(temporary)
                if size:
                    self._try_space(temporary, size)
                self._open_folders[temporary] = {}
                yield temporary
                self._complete(temporary, final, extra or {})
            except Exception:
                with suppress(OSError):
                    self.remove_tree(temporary)
                raise
            finally:
                self._open_folders.pop(temporary, None)

    def _try_space(self, folder: Path, size: int) -> None:
        probe = folder / ".space"
        fd = self.create(probe)
        try:
            self.reserve(fd, probe, size)
        finally:
            os.close(fd)
            self.remove(probe)

    def _complete(self, temporary: Path, final: Path, extra: Mapping[str, Any]) -> None:
        written = self._open_folders.pop(temporary)
        files = {}
        for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
            name = path.relative_to(temporary).as_posix()
            files[name] = (written.get(name) or self._sync_foreign(path))._asdict()
        manifest = json.dumps({"format": MANIFEST_FORMAT, "extra": dict(extra), "files": files}, indent=1, sort_keys=True)
        self._write_stream(temporary / MANIFEST, (manifest.encode(),), len(manifest.encode()))
        for path in sorted(p for p in temporary.rglob("*") if p.is_dir()):
            self.fsync_folder(path)
        self.fsync_folder(temporary)
        if final.exists():  # the same step saved again: the old one goes only now, when the new one is complete
            self.prune([final])
        self.rename(temporary, final)
        self.fsync_folder(final.parent)

    def _sync_foreign(self, path: Path) -> FileRecord:
        """A file that another library wrote into the folder."""
        with path.open("rb") as file:
            self.fsync(file.fileno(), path)
        return hash_file(path)

    def prune(self, paths: Sequence[Path]) -> None:
        """Delete folders or files; each is renamed first, so a half-deleted one never carries its old name."""
        for path in paths:
            with storage_errors(path, self):
                trash = path.with_name(temporary_name(path.name, kind="trash"))
                self.rename(path, trash)
                if trash.is_dir():
                    self.remove_tree(trash)
                else:
                    self.remove(trash)

    def probe(self, folder: Path) -> None:
        """Create, write, sync, rename and delete a file in `folder`: raises StorageError before a long run instead of after it."""
        with storage_errors(folder, self):
            self.make_folder(folder)
            path = folder / temporary_name("probe")
            self.write_file(path, b"probe")
            self.remove(path)


def _chunks(data: Iterable[Buffer]) -> Iterator[Buffer]:
    """The same bytes in pieces of at most CHUNK: small buffers are joined, large ones sliced without copying."""
    small = bytearray()
    for buffer in data:
        view = memoryview(buffer).cast("B")
        is_large = len(view) >= JOINED
        if small and (is_large or len(small) + len(view) > CHUNK):
            yield small
            small = bytearray()
        if is_large:
            for start in range(0, len(view), CHUNK):
                yield view[start : start + CHUNK]
        else:
            small += view
    if small:
        yield small


def readable_size(size: float) -> str:
    """1234567 -> "1.2 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


@contextmanager
def storage_errors(path: Path, disk: Disk, size: int | None = None) -> Iterator[None]:
    """OSErrors of the body become StorageError with what was needed and what is free."""
    try:
        yield
    except FluxsmithError:
        raise
    except OSError as error:
        if error.errno in FULL:
            free = readable_size(disk.free_bytes(path))
            need = f"need {readable_size(size)}, " if size else ""
            fix = "free some space and start the same command again; complete files and checkpoints are untouched"
            raise StorageError("disk full", where=str(path), why=f"{need}{free} free on {_mount(path)}", fix=fix) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StorageError("cannot write here", where=str(path), why=str(error), fix="choose a folder that you may write to") from error
        raise StorageError(
            "writing failed", where=str(path), why=str(error), fix="check the disk, then start the same command again"
        ) from error


def _mount(path: Path) -> Path:
    path = path.absolute()
    while not os.path.ismount(path):
        path = path.parent
    return path


def clean_temporary(parent: Path, *, disk: Disk | None = None) -> list[Path]:
    """Remove temporary and trash entries of processes that are gone (dead pid, or another boot); returns them."""
    disk, removed = disk or Disk(), []
    for path in sorted(parent.iterdir()) if parent.is_dir() else ():
        owner = temporary_owner(path.name)
        if owner is None or alive(owner):
            continue
        if path.is_dir() and not path.is_symlink():
            disk.remove_tree(path)
        else:
            disk.remove(path)
        removed.append(path)
    return removed
