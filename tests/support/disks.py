"""Disks that die, fill up or write down what they do: stand-ins for kill -9, a full disk and a power cut."""

import errno
import os
import shutil
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path

from fluxsmith.io.durable import Buffer, Disk

KILLED = 137


class CountingDisk(Disk):
    """Lists every point at which a run can die: before each operation, and in the middle of each write."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[str, Path]] = []

    def tick(self, operation: str, path: Path) -> None:
        self.points.append((operation, path))


class ForkingDisk(Disk):
    """At each chosen point a forked copy of the process dies there, by `_exit`, and leaves a copy of the run folder.

    So one run gives the crash folders of all points. Everything that a killed process leaves is there: half-written files, temporary
    folders with its process number, no clean-up of any kind.
    """

    def __init__(self, run_dir: Path, crashes: Path, chosen: Container[int]) -> None:
        super().__init__()
        self.run_dir, self.crashes, self.chosen = run_dir, crashes, chosen
        self.count = 0
        self.pid = os.getpid()

    def tick(self, operation: str, path: Path) -> None:
        if self.count in self.chosen:
            child = os.fork()
            if child == 0:
                self._die(self.crashes / str(self.count) / self.run_dir.name)
            _, status = os.waitpid(child, 0)
            if os.waitstatus_to_exitcode(status) != KILLED:
                raise RuntimeError(f"the process that should die at point {self.count} ended with status {status}")
        self.count += 1

    def _die(self, folder: Path) -> None:
        status = 1
        try:
            if self.run_dir.exists():
                shutil.copytree(self.run_dir, folder, symlinks=True)
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.rglob(f".*.{self.pid}-*"), reverse=True):  # temporary names carry the number of who made them
                path.rename(path.with_name(path.name.replace(f".{self.pid}-", f".{os.getpid()}-")))
            status = KILLED
        finally:
            os._exit(status)


class FullDisk(Disk):
    """No space from the n-th write on, counted while `armed`; `times` limits how often it fails."""

    def __init__(self, at: int, code: int = errno.ENOSPC) -> None:
        super().__init__()
        self.at, self.code, self.count = at, code, 0
        self.armed: Callable[[Path], bool] = lambda path: True

    def tick(self, operation: str, path: Path) -> None:
        if operation not in ("create", "reserve", "write", "half", "mkdir", "append") or not self.armed(path):
            return
        self.count += 1
        if self.count >= self.at:
            raise OSError(self.code, os.strerror(self.code), str(path))


@dataclass(frozen=True)
class Operation:
    """What reached the kernel, in order; `mark` is a note of the test."""

    kind: str
    path: Path
    data: bytes = b""
    place: int = 0
    source: Path | None = field(default=None)


class RecordingDisk(Disk):
    """Does the work and remembers each operation with its data."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def mark(self, name: str) -> None:
        self.operations.append(Operation("mark", Path(name)))

    def create(self, path: Path) -> int:
        fd = super().create(path)
        self.operations.append(Operation("create", path))
        return fd

    def write(self, fd: int, path: Path, data: Buffer) -> None:
        super().write(fd, path, data)
        end = os.lseek(fd, 0, os.SEEK_CUR)
        self.operations.append(Operation("write", path, bytes(memoryview(data).cast("B")), end - memoryview(data).nbytes))

    def reserve(self, fd: int, path: Path, size: int) -> None:
        super().reserve(fd, path, size)
        self.operations.append(Operation("reserve", path, place=size))

    def fsync(self, fd: int, path: Path) -> None:
        super().fsync(fd, path)
        self.operations.append(Operation("fsync", path))

    def fsync_folder(self, path: Path) -> None:
        super().fsync_folder(path)
        self.operations.append(Operation("fsync-folder", path))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.operations.append(Operation("rename", target, source=source))

    def mkdir(self, path: Path) -> None:
        for folder in reversed([folder for folder in (path, *path.parents) if not folder.exists()]):
            self.operations.append(Operation("mkdir", folder))
        super().mkdir(path)

    def remove(self, path: Path) -> None:
        super().remove(path)
        self.operations.append(Operation("remove", path))

    def remove_tree(self, path: Path) -> None:
        super().remove_tree(path)
        self.operations.append(Operation("remove", path))

    def truncate(self, path: Path, size: int) -> None:
        super().truncate(path, size)
        self.operations.insert(len(self.operations) - 1, Operation("truncate", path, place=size))  # before its fsync
