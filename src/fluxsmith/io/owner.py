"""Who writes here: names of temporary files, and the lock that keeps two runs out of one folder.

`with RunLock(run_dir): ...` holds the folder for the life of the process; a second one ends with exit code 8.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from fluxsmith.errors import RunLockedError, StorageError

LOCK_NAME = "run.lock"
NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
HEARTBEAT_SECONDS = 600  # a lock of another host without flock is taken over after this silence
TEMPORARY = re.compile(r"^\.(?:trash-)?.*\.(?P<pid>\d+)-(?P<boot>[0-9a-f]{8})\.(?:tmp|trash)$", re.DOTALL)
LONGEST_NAME = 200  # bytes kept of the name, so that pid, boot id and ending fit into NAME_MAX


class Owner(NamedTuple):
    """The process that made a temporary entry; `boot` is the start of the kernel's boot id."""

    pid: int
    boot: str


def boot_id() -> str:
    """The kernel's boot id; a hash of the host name where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
    except OSError:
        return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:32]


def temporary_name(name: str, *, kind: str = "tmp") -> str:
    """A hidden name that says whose it is: `.step-000500.4711-0a1b2c3d.tmp`."""
    encoded = os.fsencode(name)
    if len(encoded) > LONGEST_NAME:
        name = hashlib.sha256(encoded).hexdigest()
    return f".{name}.{os.getpid()}-{boot_id()[:8]}.{kind}"


def temporary_owner(name: str) -> Owner | None:
    """Whose temporary entry this is; None for any other name."""
    found = TEMPORARY.match(name)
    return Owner(int(found["pid"]), found["boot"]) if found else None


def alive(owner: Owner) -> bool:
    """Does the process still run, in this boot?"""
    if owner.boot != boot_id()[:8]:
        return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


class RunLock:
    """The run folder belongs to this process. Freed by the kernel when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self._fd: int | None = None

    def acquire(self) -> Self:
        """Take the lock or raise RunLockedError with pid, host and since when; never waits."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            why, fix = str(error), "choose a folder that you may write to"
            raise StorageError("cannot write the lock file", where=str(self.path), why=why, fix=fix) from error
        try:
            self._lock(fd)
        except BaseException:
            os.close(fd)
            raise
        record = {"pid": os.getpid(), "host": socket.gethostname(), "boot": boot_id(), "since": time.time()}
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(record).encode(), 0)
        self._fd = fd
        return self

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._held(_record(fd)) from None
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise StorageError("cannot lock", where=str(self.path), why=str(error)) from error
            self._check_heartbeat(fd)

    def _check_heartbeat(self, fd: int) -> None:
        """A file system without flock: believe the record while its process lives here or its file was touched lately."""
        record = _record(fd)
        if not record:
            return
        if record.get("host") == socket.gethostname():
            held = alive(Owner(int(record.get("pid", 0)), str(record.get("boot", ""))[:8]))
        else:
            held = time.time() - os.fstat(fd).st_mtime < HEARTBEAT_SECONDS
        if held:
            raise self._held(record)

    def _held(self, record: dict[str, Any]) -> RunLockedError:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.get("since", 0)))
        who = f"in use by pid {record.get('pid', '?')} on host {record.get('host', '?')} since {since}"
        return RunLockedError(who, where=str(self.path.parent), fix="wait for it, stop it, or choose another run.dir")

    def beat(self) -> None:
        """Show that the run is alive, for file systems without flock."""
        if self._fd is not None:
            os.utime(self._fd)

    def release(self) -> None:
        """Give the folder back; the record is emptied, the file stays (removing it would race with the next owner)."""
        if self._fd is not None:
            os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def _record(fd: int) -> dict[str, Any]:
    try:
        record = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
