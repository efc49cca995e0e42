"""SIGKILL the real command at random moments until it has finished, again and again, and compare with runs that nobody disturbed.

`python bench/kill_test.py --kills 100` prints one JSON object: kills that landed, where they landed, runs, and runs that differ
(0 is the only good number). A nightly run takes 1000. `--jobs` runs that many at a time.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "support")]

from exact_resume import KINDS, result_of  # noqa: E402  needs the path above
from tiny_run import config, prepare_files  # noqa: E402

from fluxsmith.config.dump import to_toml  # noqa: E402

LENGTH = {"train.steps": 60, "checkpoint.every": 3}
MOST_STARTS = 60  # of one run, before it must have got to its end
BEFORE_PROGRESS = 0.15  # share of kills that may land anywhere after the start, before the first row of this start


class Trial:
    """One run folder: killed and started again until the command ends by itself."""

    def __init__(self, model: Path, folder: Path, kind: str, seed: int) -> None:
        self.run_dir = folder / "run"
        folder.mkdir(parents=True)
        self.config = folder / "run.toml"
        self.config.write_text(to_toml(config(model, self.run_dir, {**KINDS[kind], **LENGTH, "run.name": "w"})))
        self.rng = random.Random(seed)
        self.places: Counter[str] = Counter()
        self.failure = ""

    def start(self) -> "subprocess.Popen[str]":
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", "fluxsmith", "train", str(self.config), "--resume", "--quiet"]
        return subprocess.Popen(words, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def finish(self, starts: int = MOST_STARTS) -> None:
        """Kill until the command ends by itself; the last of `starts` is left alone."""
        for number in range(starts):
            process = self.start()
            if number < starts - 1:
                self._kill_some_time(process)
            _, errors = process.communicate()
            if process.returncode == 0:
                return
            if process.returncode != -signal.SIGKILL:
                self.failure = f"exit {process.returncode}: {errors[-2000:]}"
                return
            self.places[self._place()] += 1
        self.failure = "it never came to its end"

    def _kill_some_time(self, process: "subprocess.Popen[str]") -> None:
        """Mostly a random while after training has begun, where the files are written; sometimes at any time before."""
        if self.rng.random() < BEFORE_PROGRESS:
            wait = self.rng.uniform(0, 6)
        else:
            metrics = self.run_dir / "metrics.jsonl"
            before = metrics.stat().st_mtime_ns if metrics.exists() else 0
            while process.poll() is None and (not metrics.exists() or metrics.stat().st_mtime_ns == before):
                time.sleep(0.001)
            wait = self.rng.uniform(0, 0.6)
        deadline = time.monotonic() + wait
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.0005)
        if process.poll() is None:
            process.kill()

    def _place(self) -> str:
        """What the kill interrupted, as far as the folder tells."""
        folders = [self.run_dir, self.run_dir / "state", self.run_dir / "weights"]
        hidden = [path.name for folder in folders if folder.is_dir() for path in folder.iterdir() if path.name.startswith(".")]
        if any(name.startswith(".step-") and name.endswith(".tmp") for name in hidden):
            return "inside a state"
        if any(name.endswith(".trash") for name in hidden):
            return "inside a prune"
        if hidden:
            return "inside another file"
        return "between steps" if (self.run_dir / "state").is_dir() else "before the first state"


def reference(model: Path, folder: Path, kind: str) -> dict[str, str]:
    """The result of the same command, undisturbed."""
    trial = Trial(model, folder, kind, 0)
    process = trial.start()
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors)
    return result_of(trial.run_dir)


def kill_test(kills: int, jobs: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Trials until `kills` have landed."""
    begun = time.monotonic()
    model = prepare_files(folder / "model")
    expected = {kind: reference(model, folder / f"reference-{kind}", kind) for kind in KINDS}
    places: Counter[str] = Counter()
    failures: list[str] = []
    runs = 0

    def one(number: int) -> None:
        nonlocal runs
        kind = sorted(KINDS)[number % len(KINDS)]
        trial = Trial(model, folder / f"trial{number}", kind, seed + number)
        trial.finish()
        found = result_of(trial.run_dir) if not trial.failure else {}
        different = sorted(name for name in found.keys() | expected[kind].keys() if found.get(name) != expected[kind].get(name))
        if trial.failure or different:
            failures.append(f"{kind} {number}: {trial.failure or different}")
        places.update(trial.places)
        runs += 1
        shutil.rmtree(trial.run_dir.parent)

    number = 0
    with ThreadPoolExecutor(jobs) as pool:
        while places.total() < kills:
            list(pool.map(one, range(number, number + jobs)))
            number += jobs
    return {
        "kills": places.total(),
        "places": dict(places),
        "runs": runs,
        "diverged_or_unusable": len(failures),
        "failures": failures[:5],
        "seconds": round(time.monotonic() - begun, 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if any run differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    memory = Path("/dev/shm")  # noqa: S108  thousands of small files; a kill leaves the page cache, so the medium does not matter
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        found = kill_test(options.kills, options.jobs, Path(folder), options.seed)
    print(json.dumps(found, indent=1))
    return int(found["diverged_or_unusable"] > 0)


if __name__ == "__main__":
    sys.exit(main())
