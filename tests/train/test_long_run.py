"""Two thousand steps with states and samples in between: memory, open files and threads stay where they were."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).resolve().parent.parent / "support"
STEPS = 2000
SCRIPT = """
import json, os, sys, threading
from pathlib import Path
import torch
from tiny_run import config
from fluxsmith.events import Bus, StepEnded
from fluxsmith.train.run import train

torch.set_num_threads(1)
model, folder, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
sample = {"prompt": "a red circle", "every": 200, "width": 32, "height": 32, "steps": 1}
changes = {"train.steps": steps, "train.accumulation": 1, "checkpoint.every": 200, "sample": [sample]}
rows = []

def note(event):
    if isinstance(event, StepEnded) and event.step % 10 == 0:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        rows.append((pages, len(os.listdir("/proc/self/fd")), threading.active_count()))

train(config(model, folder / "run", changes), bus=Bus(note))
print(json.dumps(rows))
"""


@pytest.mark.timeout(600)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_nothing_grows(tiny_model: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{SUPPORT.parent.parent / 'src'}:{SUPPORT}", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", SCRIPT, str(tiny_model), str(tmp_path), str(STEPS)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages, files, threads = zip(*json.loads(done.stdout), strict=True)
    assert len(pages) == STEPS // 10
    early, late = (sum(part) / len(part) for part in (pages[40:60], pages[-20:]))  # steps 400 to 600, and the last 200
    assert late < early * 1.02, f"{early * 4096 / 1e6:.1f} MB at step 500, {late * 4096 / 1e6:.1f} MB at the end"
    assert files[-1] == files[40]
    assert threads[-1] == threads[40]
