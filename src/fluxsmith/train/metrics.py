"""metrics.jsonl: one row an optimizer step, exactly once, with the loss as a hex float; and what it weighs on resume."""

import json
import math
from pathlib import Path

from fluxsmith.io.durable import Disk


class Metrics:
    """Append-only rows; `size` is what a checkpoint remembers, `rewind` cuts the file back to it."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self.path = path
        self.disk = disk
        self.size = path.stat().st_size if path.exists() else 0

    def add(self, step: int, loss: float, lr: float, grad_norm: float) -> None:
        """One row."""
        values = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
        row = {"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}}  # JSON has no NaN
        text = json.dumps({**row, "loss_hex": loss.hex(), "grad_norm_hex": grad_norm.hex()}) + "\n"
        self.disk.append_text(self.path, text)
        self.size += len(text)

    def sync(self) -> None:
        """The rows are on the medium: a state that counts them must not outlive them."""
        if self.path.exists():
            self.disk.append_text(self.path, "", durable=True)
            self.disk.fsync_folder(self.path.parent)

    def rewind(self, size: int) -> int:
        """Drop rows (and a torn last line) beyond `size` bytes: steps after the checkpoint are computed again.

        Returns the bytes that are missing because somebody shortened or removed the file.
        """
        found = self.path.stat().st_size if self.path.exists() else 0
        if found > size:
            self.disk.truncate(self.path, size)
        self.size = min(found, size)
        return size - self.size
