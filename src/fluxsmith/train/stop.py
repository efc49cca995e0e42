"""Stopping on request: the first SIGINT or SIGTERM (or a STOP file) asks for a checkpoint, the second ends at once."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Self


class StopSwitch:
    """Use as a context around the loop; `requested` is read between steps."""

    def __init__(self, run_dir: Path) -> None:
        self.stop_file = run_dir / "STOP"
        self.by = ""
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """True once a signal came or the STOP file is there."""
        if not self.by and self.stop_file.exists():
            self.by = "STOP file"
        return bool(self.by)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.by:  # asked twice: leave now; what is on disk is consistent
            os._exit(128 + number)
        self.by = signal.Signals(number).name

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only; the STOP file works anywhere
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() itself returned
        self.stop_file.unlink(missing_ok=True)
