"""What saving costs: share of the wall time that states and weights files take, fsync included, and the longest stall.

`python bench/save_cost.py --steps 300 --every 100` trains the blank demo model (2.4 M weights) as LoRA and whole, on the disk of the
temporary folder (`--folder` for another), and prints JSON. The share at another cadence is in proportion.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "support")]

import torch  # noqa: E402  needs the path above
from tiny_run import LORA, config, write_pictures  # noqa: E402

from fluxsmith.demo.blank import write_blank  # noqa: E402
from fluxsmith.events import Bus, StepEnded  # noqa: E402
from fluxsmith.train import trainer  # noqa: E402
from fluxsmith.train.run import train  # noqa: E402

DEFAULT_EVERY = 250  # of the demo and of the examples
KINDS: dict[str, dict[str, Any]] = {"lora": {**LORA, "adapter.rank": 16}, "full": {}, "full with average": {"train.ema": {"decay": 0.999}}}


def timed(work: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    """`work`, with its seconds noted."""

    def run(*args: Any, **options: Any) -> Any:
        begun = time.monotonic()
        try:
            return work(*args, **options)
        finally:
            into.append(time.monotonic() - begun)

    return run


def measure(model: Path, folder: Path, kind: str, steps: int, every: int) -> dict[str, Any]:
    """Train, and add up what saving took."""
    saves: list[float] = []
    seconds: list[float] = []
    original = trainer.Trainer._save, trainer.export_weights
    trainer.Trainer._save, trainer.export_weights = timed(original[0], saves), timed(original[1], saves)
    changes = {"train.ema": None, "train.accumulation": 1, "data.0.resolution": 64, **KINDS[kind]}
    run = config(model, folder / kind.replace(" ", "-"), {**changes, "train.steps": steps, "checkpoint.every": every})

    def note(event: object) -> None:
        if isinstance(event, StepEnded):
            seconds.append(event.seconds)

    try:
        train(run, bus=Bus(note))
    finally:
        trainer.Trainer._save, trainer.export_weights = original
    step = sorted(seconds)[len(seconds) // 2]
    a_save = sum(saves) / (steps / every)
    return {
        "milliseconds_a_step": round(1000 * step, 1),
        "milliseconds_a_save": round(1000 * a_save, 1),
        "longest_stall_ms": round(1000 * max(saves), 1),
        "share_at_this_cadence": round(sum(saves) / (sum(saves) + sum(seconds)), 4),
        "share_at_default_cadence": round(a_save / (a_save + DEFAULT_EVERY * step), 4),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_blank(folder)
        write_pictures(folder / "pictures", size=(64, 64))
        found = {kind: measure(folder, folder / "runs", kind, options.steps, options.every) for kind in KINDS}
    print(json.dumps({"default_every": DEFAULT_EVERY, **found}, indent=1))


if __name__ == "__main__":
    main()
