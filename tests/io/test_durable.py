"""What is on disk after a kill at any point, a full disk, a power cut: the old file or the new one, never half of it."""

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from fluxsmith.errors import ModelFileError, StorageError
from fluxsmith.io.durable import Disk, clean_temporary, hash_file, newest_complete, readable_size, verify_folder
from fluxsmith.io.owner import temporary_name, temporary_owner


class Killed(BaseException):
    """Stands for kill -9: nothing of ours may run afterwards."""


class CrashingDisk(Disk):
    """Dies at its n-th tick."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def tick(self, operation: str, path: Path) -> None:
        self.count += 1
        if self.count >= self.at:
            raise Killed


class FailingDisk(Disk):
    """Raises an OSError at its n-th tick, once."""

    def __init__(self, at: int, code: int = errno.ENOSPC) -> None:
        super().__init__()
        self.at, self.code, self.count = at, code, 0

    def tick(self, operation: str, path: Path) -> None:
        self.count += 1
        if self.count == self.at:
            raise OSError(self.code, os.strerror(self.code), str(path))


class RecordingDisk(Disk):
    """Remembers what was done, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, Path]] = []

    def tick(self, operation: str, path: Path) -> None:
        self.operations.append((operation, path))


def ticks(work: Callable[[Disk], None]) -> int:
    disk = RecordingDisk()
    work(disk)
    return len(disk.operations)


def save_step(disk: Disk, run: Path, step: int) -> None:
    with disk.folder(run / f"step-{step:06d}", extra={"step": step}, size=4096) as folder:
        disk.write_bytes(folder / "weights.safetensors", bytes([step % 256]) * 1000)
        disk.write_json(folder / "sub.json", {"step": step})


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_write_file_replaces_and_reports(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    Disk().write_text(path, "old")
    record = Disk().write_text(path, "new ü")
    assert path.read_text("utf-8") == "new ü"
    assert record == hash_file(path)
    assert hidden(tmp_path) == []


def test_stream_of_buffers_and_a_wrong_size(tmp_path: Path) -> None:
    parts = [b"a" * 10, b"", memoryview(b"b" * (20 << 20)), b"c"]
    record = Disk().write_file(tmp_path / "big", iter(parts), size=100 << 20)
    assert record == hash_file(tmp_path / "big")
    assert record.size == 11 + (20 << 20)
    assert (tmp_path / "big").read_bytes() == b"".join(parts)


def test_mode_follows_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        Disk().write_bytes(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_killed_write_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    Disk().write_bytes(path, b"old" * 100)
    count = ticks(lambda disk: disk.write_bytes(path, b"old" * 100) and None)
    assert count >= 7  # create, reserve, write, half, fsync, rename, folder
    seen = set()
    for at in range(1, count + 1):
        Disk().write_bytes(path, b"old" * 100)
        with pytest.raises(Killed):
            CrashingDisk(at).write_bytes(path, b"new" * 100)
        assert path.read_bytes() in (b"old" * 100, b"new" * 100)
        seen.add(path.read_bytes())
    assert len(seen) == 2  # both outcomes were met, so the points cover the rename


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES, errno.EMFILE, errno.EDQUOT])
def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, code: int) -> None:
    path = tmp_path / "a"
    Disk().write_bytes(path, b"old")
    for at in range(1, 7):
        with pytest.raises(StorageError) as caught:
            FailingDisk(at, code).write_bytes(path, b"new")
        assert caught.value.exit_code == 7
        assert path.read_bytes() == b"old"
        assert hidden(tmp_path) == []


def test_full_disk_names_the_numbers(tmp_path: Path) -> None:
    class Full(FailingDisk):
        def free_bytes(self, path: Path) -> int:
            return 300_000_000

    with pytest.raises(StorageError, match=r"need 1\.2 GB, 300\.0 MB free on /"):
        Full(2).write_file(tmp_path / "a", iter([b"x"]), size=1_200_000_000)


def test_folder_is_complete_or_absent_at_every_kill_point(tmp_path: Path) -> None:
    count = ticks(lambda disk: save_step(disk, tmp_path / "count", 2))
    assert count > 20
    outcomes = set()
    for at in range(1, count + 1):
        run = tmp_path / str(at)
        save_step(Disk(), run, 1)
        with pytest.raises(Killed):
            save_step(CrashingDisk(at), run, 2)
        newest = newest_complete(run)
        assert newest.manifest is not None
        assert newest.passed_over == ()
        outcomes.add(newest.manifest.extra["step"])
    assert outcomes == {1, 2}


def test_saving_the_same_step_again_is_safe_too(tmp_path: Path) -> None:
    save_step(Disk(), tmp_path / "x", 2)
    count = ticks(lambda disk: save_step(disk, tmp_path / "x", 2))
    for at in range(1, count + 1):
        run = tmp_path / str(at)
        save_step(Disk(), run, 1)
        save_step(Disk(), run, 2)
        with pytest.raises(Killed):
            save_step(CrashingDisk(at), run, 2)
        newest = newest_complete(run)
        assert newest.manifest is not None
        assert newest.manifest.extra["step"] in (1, 2)


def test_full_disk_removes_only_its_own_folder(tmp_path: Path) -> None:
    save_step(Disk(), tmp_path, 1)
    others = [temporary_name("x"), "step-000007"]
    for name in others:
        (tmp_path / name).mkdir()
    count = ticks(lambda disk: save_step(disk, tmp_path / "count", 2))
    for at in range(1, count - 1):  # the last two are the rename and the sync of the parent
        with pytest.raises(StorageError):
            save_step(FailingDisk(at), tmp_path, 2)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "count", "step-000001"])
        verify_folder(tmp_path / "step-000001")


def test_an_error_of_the_body_passes_and_removes_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), Disk().folder(tmp_path / "step-1"):
        raise ValueError("mine")
    assert list(tmp_path.iterdir()) == []


def test_files_of_other_writers_are_synced_and_hashed(tmp_path: Path) -> None:
    disk = RecordingDisk()
    with disk.folder(tmp_path / "step-1") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "foreign.txt").write_text("x")
    assert "sub/foreign.txt" in verify_folder(tmp_path / "step-1").files
    assert ("fsync", folder / "sub" / "foreign.txt") in disk.operations
    assert ("fsync-folder", folder / "sub") in disk.operations


def test_order_survives_a_power_cut(tmp_path: Path) -> None:
    """Before a rename, all that is under the source is synced, files first; after it, the parent is."""
    disk = RecordingDisk()
    save_step(disk, tmp_path, 1)
    done: set[Path] = set()
    dirty: set[Path] = set()
    for operation, path in disk.operations:
        if operation in ("create", "write", "half"):
            dirty.add(path)
        elif operation == "remove":
            dirty.discard(path)
        elif operation == "fsync":
            dirty.discard(path)
            done.add(path)
        elif operation == "fsync-folder" and path != tmp_path:
            assert not dirty  # entries are made durable after the content
            done.add(path)
        elif operation == "rename":
            assert not dirty
            assert any(p.name.startswith(".step-000001") for p in done)
            done.clear()
    assert disk.operations[-1] == ("fsync-folder", tmp_path)
    names = [path.name for operation, path in disk.operations if operation == "create"]
    assert names[-1] == "MANIFEST.json"


DAMAGE: dict[str, Callable[[Path], object]] = {
    "MANIFEST.json": lambda folder: (folder / "MANIFEST.json").unlink(),
    "damaged": lambda folder: (folder / "MANIFEST.json").write_text("{"),
    "format 9": lambda folder: (folder / "MANIFEST.json").write_text('{"format": 9, "files": {}, "extra": {}}'),
    "missing": lambda folder: (folder / "sub.json").unlink(),
    "another size": lambda folder: (folder / "sub.json").write_text("{}"),
    "another content": lambda folder: (folder / "weights.safetensors").write_bytes(bytes(1000)),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_found_and_an_older_folder_is_used(tmp_path: Path, message: str) -> None:
    save_step(Disk(), tmp_path, 9)
    save_step(Disk(), tmp_path, 10)
    DAMAGE[message](tmp_path / "step-000010")
    with pytest.raises(ModelFileError, match=message):
        verify_folder(tmp_path / "step-000010")
    newest = newest_complete(tmp_path)
    assert newest.manifest is not None
    assert newest.manifest.extra == {"step": 9}
    assert "step-000010" in str(newest.passed_over[0])


def test_newest_goes_by_number_not_by_time(tmp_path: Path) -> None:
    for step in (100, 20):
        save_step(Disk(), tmp_path, step)
    newest = newest_complete(tmp_path)
    assert newest.manifest is not None
    assert newest.manifest.extra["step"] == 100
    assert newest_complete(tmp_path / "none") == (None, ())


def test_clean_temporary_spares_the_living(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)  # a pid that is surely gone
    mine = temporary_name("step-000001")
    dead = mine.replace(f".{os.getpid()}-", f".{pid}-")
    other_boot = mine[:-12] + "00000000.tmp"
    for name in (mine, dead, other_boot, "step-000001", ".hidden", ".x.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / dead.replace(".tmp", ".trash")).write_text("x")
    removed = clean_temporary(tmp_path)
    assert sorted(path.name for path in removed) == sorted([dead, other_boot, dead.replace(".tmp", ".trash")])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([mine, "step-000001", ".hidden", ".x.tmp"])


def test_long_and_odd_names(tmp_path: Path) -> None:
    name = "ü" * 127
    Disk().write_text(tmp_path / name, "x")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert temporary_owner(temporary_name("a\nb -x")) is not None


def test_append_and_truncate(tmp_path: Path) -> None:
    disk, path = Disk(), tmp_path / "log.jsonl"
    disk.append_text(path, "one\n")
    disk.append_text(path, "two\n", durable=True)
    disk.truncate(path, 4)
    assert path.read_text() == "one\n"
    with pytest.raises(Killed):
        CrashingDisk(3).append_text(path, "three\n")
    assert path.read_text() == "one\nthr"


def test_probe_finds_a_read_only_folder(tmp_path: Path) -> None:
    Disk().probe(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(StorageError, match="cannot write here"):
        FailingDisk(2, errno.EROFS).probe(tmp_path / "new")


def test_prune_renames_before_it_deletes(tmp_path: Path) -> None:
    save_step(Disk(), tmp_path, 1)
    with pytest.raises(Killed):
        CrashingDisk(2).prune([tmp_path / "step-000001"])
    assert not (tmp_path / "step-000001").exists()
    assert len(hidden(tmp_path)) == 1
    (tmp_path / "file").write_text("x")
    Disk().prune([tmp_path / "file"])
    assert len(list(tmp_path.iterdir())) == 1


def test_manifest_is_plain_json(tmp_path: Path) -> None:
    save_step(Disk(), tmp_path, 3)
    content = json.loads((tmp_path / "step-000003" / "MANIFEST.json").read_text())
    assert content["extra"] == {"step": 3}
    assert content["files"]["sub.json"] == hash_file(tmp_path / "step-000003" / "sub.json")._asdict()


def test_readable_sizes() -> None:
    assert [readable_size(n) for n in (12, 1234, 1_200_000_000, 5e13)] == ["12 bytes", "1.2 kB", "1.2 GB", "50.0 TB"]
