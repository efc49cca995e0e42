"""Starting a group of processes on this machine."""

import os
import socket
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(size: int) -> list[str]:
    """The beginning of a command line."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-port", str(free_port())]


def environment(**more: str) -> dict[str, str]:
    """One thread a process, our source first."""
    return {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", **more}
