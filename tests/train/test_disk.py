"""A disk that fills up or refuses: the old states stay, our own leftovers go, the message has the numbers, and the run goes on later."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from disks import CountingDisk, FullDisk
from ran import Go, same

from fluxsmith.config.dump import to_toml
from fluxsmith.config.schema import RunConfig
from fluxsmith.errors import StorageError
from fluxsmith.events import Bus
from fluxsmith.io.manifest import verify_folder
from fluxsmith.train.checkpoint import State, StateFolder, restore
from fluxsmith.train.distributed import World
from fluxsmith.train.setup import Parts, build

SOURCE = Path(__file__).resolve().parents[2] / "src"
WRITES = ("create", "reserve", "write", "half", "mkdir", "append")


@pytest.fixture
def parts(run_config: Callable[..., RunConfig]) -> Parts:
    """A built run whose optimizer has moments."""
    made = build(run_config({"train.ema": {"decay": 0.9}}), World(torch.device("cpu")), Bus())
    for param in made.trained.params.values():
        param.grad = torch.ones_like(param)
    made.optimizer.step()
    return made


def save(parts: Parts, folder: Path, step: int, disk: CountingDisk | FullDisk | None = None) -> None:
    states = StateFolder(folder, disk or CountingDisk())
    states.save(State(step, 0, {}, {}), parts.trained.params, parts.optimizer, parts.ema, keep=1)


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EMFILE])
def test_every_write_of_a_save_can_fail(parts: Parts, tmp_path: Path, code: int) -> None:
    counting = CountingDisk()
    save(parts, tmp_path / "count", 4)
    save(parts, tmp_path / "count", 8, counting)
    number = sum(operation in WRITES for operation, _ in counting.points)
    assert number >= 20
    states = tmp_path / "state"
    save(parts, states, 4)
    for at in range(1, number + 1):
        with pytest.raises(StorageError) as caught:
            save(parts, states, 8, FullDisk(at, code))
        assert caught.value.exit_code == 7
        assert [path.name for path in states.iterdir()] == ["step-000004"], f"write {at}: {hidden(states)}"
        verify_folder(states / "step-000004")
    save(parts, states, 8)
    restore(states / "step-000008", parts.trained.params, parts.optimizer, parts.ema)


def test_the_message_has_the_numbers(parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        save(parts, tmp_path, 4, FullDisk(5))
    text = str(caught.value)
    assert "disk full" in text
    assert "need" in text
    assert "free on" in text
    assert "kB" in text or "MB" in text


@pytest.mark.parametrize("at", [1, 9, 17])
def test_a_run_on_a_disk_that_fills_up(go: Go, at: int) -> None:
    """Full from the n-th write of the second state on, events and report included; with space again it ends as if nothing had been."""
    straight = go({"checkpoint.every": 2}, "straight")
    disk = FullDisk(at)
    begun: list[bool] = []

    def armed(path: Path) -> bool:
        begun[:] = begun or ([True] if "step-000004" in str(path) else [])
        return bool(begun)

    disk.armed = armed
    ran = go({"checkpoint.every": 2}, disk=disk)
    assert ran.error is not None
    assert ran.error.exit_code == 7
    assert ran.states == [2]
    text = "\n".join(ran.error.lines())
    assert "disk full" in text
    assert "the newest state is that of step 2" in text
    again = go({"checkpoint.every": 2}, resume=True)
    assert again.error is None
    assert again.losses == straight.losses
    assert same(again.weights, straight.weights)
    assert hidden(again.folder) == []


def test_a_lack_of_space_is_told_at_the_start(go: Go) -> None:
    class Small(FullDisk):
        def free_bytes(self, path: Path) -> int:
            return 300_000

    assert "states and one being written need about" in go({}, disk=Small(10**9)).warnings
    assert go({}, "roomy").warnings == ""


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_loaded(go: Go) -> None:
    ran = go({"model.path": "does-not-exist.safetensors"}, disk=FullDisk(1, errno.EROFS))
    assert ran.error is not None
    assert ran.error.exit_code == 7
    assert "cannot write here" in str(ran.error)


def test_a_full_log_ends_the_run_with_7(go: Go) -> None:
    disk = FullDisk(1)
    disk.armed = lambda path: path.name == "metrics.jsonl"
    ran = go({}, disk=disk)
    assert ran.error is not None
    assert ran.error.exit_code == 7


def test_events_that_cannot_be_written_do_not_end_the_run(go: Go) -> None:
    disk = FullDisk(4)
    disk.armed = lambda path: path.name == "events.jsonl"
    ran = go({}, disk=disk)
    assert ran.error is None
    assert "events.jsonl was switched off" in ran.warnings


def run_command(config: RunConfig, tmp_path: Path, before: str = "", user: str = "") -> "subprocess.CompletedProcess[str]":
    """The real command, perhaps after shell commands in a mount namespace of its own."""
    path = tmp_path / "run.toml"
    path.write_text(to_toml(config))
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "fluxsmith", "train", str(path), "--quiet"]
    if before:
        words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'{before} && exec "$@"', "sh", *words]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=110)


def may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
    return subprocess.run(words, capture_output=True).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="no user and mount namespaces here")
def test_a_real_full_file_system(tiny_model: Path, tmp_path: Path, run_config: Callable[..., RunConfig]) -> None:
    run_config_ = run_config({"checkpoint.every": 1, "checkpoint.keep": 9, "train.steps": 40})
    folder = run_config_.run.dir
    folder.mkdir()
    done = run_command(run_config_, tmp_path, f"mount -t tmpfs -o size=1200k none {folder}")
    assert done.returncode == 7, done.stderr
    assert "disk full" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not may_mount(), reason="no user and mount namespaces here")
def test_a_real_read_only_folder_is_found_before_the_model_is_loaded(tmp_path: Path, run_config: Callable[..., RunConfig]) -> None:
    config = run_config({"model.path": str(tmp_path / "does-not-exist.safetensors")})
    config.run.dir.mkdir()
    done = run_command(config, tmp_path, f"mount -t tmpfs -o ro,size=64k none {config.run.dir}")
    assert done.returncode == 7, done.stderr
    assert "cannot write here" in done.stderr
