"""One run in a folder: the second is told who holds it; a dead holder's lock is free."""

import os
import signal
import time
from pathlib import Path

import pytest

from fluxsmith.errors import RunLockedError, StorageError
from fluxsmith.io import owner
from fluxsmith.io.durable import RunLock


def test_second_lock_names_the_first(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        with pytest.raises(RunLockedError, match=rf"pid {os.getpid()} on host .* since 20") as caught, RunLock(tmp_path):
            pass
        assert caught.value.exit_code == 8
    with RunLock(tmp_path):
        pass


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        RunLock(tmp_path).acquire()
        (tmp_path / "held").write_text("")
        time.sleep(60)
        os._exit(1)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(RunLockedError, match=f"pid {pid}"):
        RunLock(tmp_path).acquire()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    RunLock(tmp_path).acquire().release()


def test_without_flock_the_record_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(fd: int, how: int) -> None:
        raise OSError(owner.NO_FLOCK[0], "no locks here")

    monkeypatch.setattr(owner.fcntl, "flock", unsupported)
    first = RunLock(tmp_path).acquire()
    with pytest.raises(RunLockedError):
        RunLock(tmp_path).acquire()
    first.beat()
    first.release()
    RunLock(tmp_path).acquire().release()
    (tmp_path / "run.lock").write_text('{"pid": 1, "host": "elsewhere", "boot": "0", "since": 0}')
    with pytest.raises(RunLockedError, match="elsewhere"):
        RunLock(tmp_path).acquire()
    os.utime(tmp_path / "run.lock", (0, 0))
    RunLock(tmp_path).acquire().release()


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        RunLock(tmp_path / "file").acquire()
