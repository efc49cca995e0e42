"""Runs that are cut at every point and resumed, compared bit for bit with a run that was not.

`python exact_resume.py JOB` reads a job (JSON) from the command line, works in one warm process that forks for every point (imports
are paid once), and prints what it found as JSON. tests/train/test_exact_resume.py says what must come out.
"""

import hashlib
import json
import os
import random
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from disks import CountingDisk, ForkingDisk, RecordingDisk
from mutants import MUTANTS
from power_loss import CONTENTS, Model, write_state
from tiny_run import LORA, Options, config

from fluxsmith.events import Bus, CheckpointSaved, Event
from fluxsmith.io.durable import Disk
from fluxsmith.io.manifest import newest_complete
from fluxsmith.io.safetensors import open_weights
from fluxsmith.train.run import train

KINDS: dict[str, Options] = {
    "full": {},
    "lora": {**LORA, "adapter.dropout": 0.2, "adapter.rank_dropout": 0.1, "adapter.targets": "attention"},
}
TIMES = ("ss_training_started_at", "ss_training_finished_at", "modelspec.date")  # metadata that is a time
UNBOUND = ("events.jsonl", "report.html", "run.toml", "run.lock")  # say what happened, with times; not part of the result

WEIGHTS = "state/step-000024/weights.safetensors"

Findings = dict[str, Any]


def result_of(run_dir: Path) -> dict[str, str]:
    """Everything that must be equal: states with weights, moments and averages, rows of losses, exported tensors and metadata."""
    result = {}
    for path in sorted(path for path in run_dir.rglob("*") if path.is_file() and path.name not in UNBOUND):
        name = path.relative_to(run_dir).as_posix()
        is_weights = name.startswith("weights/") and not path.name.startswith(".")
        result[name] = hashlib.sha256(_exported(path) if is_weights else path.read_bytes()).hexdigest()
    return result


def _exported(path: Path) -> bytes:
    """Content of a weights file without the times in its metadata."""
    with open_weights(path) as weights:
        metadata = {key: value for key, value in weights.metadata.items() if key not in TIMES}
        offset = weights.headers[0].data_offset
    return json.dumps(metadata, sort_keys=True).encode() + path.read_bytes()[offset:]


def in_child(work: Callable[[], object]) -> int:
    """Exit status of a forked process that does the work; 1 and a traceback on stderr for an exception."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            work()
        except BaseException:  # noqa: BLE001  the child must never return into the parent's code
            traceback.print_exc()
            code = 1
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Bench:
    """One kind of training in one folder: the straight run, and resumed ones to compare with it."""

    def __init__(self, root: Path, model: Path, changes: Options) -> None:
        self.root, self.model, self.changes = root, model, {**changes, "run.name": "w"}
        self.straight: dict[str, str] = {}

    def train(self, run_dir: Path, disk: Disk | None = None, *, resume: bool = False, bus: Bus | None = None) -> None:
        train(config(self.model, run_dir, self.changes), resume=resume, disk=disk, bus=bus)

    def run_straight(self) -> None:
        """The run that nothing interrupts; also fills the caches and loads what Python loads late."""
        self.train(self.root / "straight" / "run")
        self.straight = result_of(self.root / "straight" / "run")

    def problem_after_resume(self, run_dir: Path, disk: Callable[[], Disk] | None = None) -> str:
        """Resume to the end in a forked process and compare; empty if all is equal. The folder is removed."""
        if in_child(lambda: self.train(run_dir, resume=True)):
            return "the resumed run failed"
        found = result_of(run_dir)
        shutil.rmtree(run_dir.parent)
        different = sorted(name for name in found.keys() | self.straight.keys() if found.get(name) != self.straight.get(name))
        return f"differs: {', '.join(different)}" if different else ""


def spread(points: Sequence[int], count: int) -> list[int]:
    """`count` of the points, evenly spaced (all, if there are fewer)."""
    return list(points) if len(points) <= count else [points[i * len(points) // count] for i in range(count)]


def crash(bench: Bench, count: int, share: tuple[int, int] = (0, 1), *, stop_at_first: bool = False) -> Findings:
    """Die at `count` points (0: all), resume, compare; `share` (k, n) takes the k-th of every n of them.

    One point in ten is at a line of events.jsonl, which carries no state.
    """
    bench.run_straight()
    counting = CountingDisk()
    bench.train(bench.root / "counted" / "run", counting)
    events = [i for i, (_, path) in enumerate(counting.points) if path.name == "events.jsonl"]
    others = [i for i, (_, path) in enumerate(counting.points) if path.name != "events.jsonl"]
    chosen = sorted([*spread(events, count // 10), *spread(others, count - count // 10)]) if count else range(len(counting.points))
    chosen = chosen[share[0] :: share[1]]
    run_dir, crashes = bench.root / "cut" / "run", bench.root / "crashes"
    if in_child(lambda: bench.train(run_dir, ForkingDisk(run_dir, crashes, set(chosen)))):
        raise RuntimeError("the run that leaves the crash folders failed")
    problems = {}
    started, resumed = 0, 0
    for point in chosen:
        folder = crashes / str(point) / "run"
        has_state = newest_complete(folder / "state").manifest is not None
        started, resumed = started + (not has_state), resumed + has_state
        problem = bench.problem_after_resume(folder)
        if problem:
            operation, path = counting.points[point]
            problems[point] = f"{operation} {path.name}: {problem}"
            if stop_at_first:
                break
    kinds = sorted({counting.points[point][0] for point in chosen})
    counts = {"points": len(chosen), "of": len(counting.points), "resumed": resumed, "from_start": started}
    return {**counts, "operations": kinds, "problems": problems}


def twice(bench: Bench, count: int) -> Findings:
    """Die at a random point, resume, die again at a random point of that, up to four times; then finish and compare."""
    bench.run_straight()
    problems, deaths = {}, 0
    for number in range(count):
        rng = random.Random(number)
        run_dir = bench.root / f"twice{number}" / "run"
        for _ in range(rng.randint(2, 4)):
            disk = DyingDisk(rng.randrange(20, 500))
            deaths += in_child(lambda disk=disk, run_dir=run_dir: bench.train(run_dir, disk, resume=True)) == 137
        problem = bench.problem_after_resume(run_dir)
        if problem:
            problems[number] = problem
    return {"runs": count, "deaths": deaths, "problems": problems}


class DyingDisk(Disk):
    """Ends the process at its n-th point."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def tick(self, operation: str, path: Path) -> None:
        self.left -= 1
        if self.left < 0:
            os._exit(137)


def power(bench: Bench, count: int, *, stop_at_first: bool = False) -> Findings:
    """Cut the power in a recorded run in every way that the model knows; resume `count` distinct states, compare."""
    bench.changes = {**bench.changes, "train.steps": 10, "checkpoint.every": 2, "checkpoint.keep": 1}  # many saves, quick to finish
    bench.run_straight()
    states = possible_states(bench)
    problems: dict[int, str] = {}
    for number, (state, saved) in enumerate(random.Random(0).sample(states, min(count, len(states)))):
        folder = bench.root / f"cut{number}" / "run"
        write_state(folder, state)
        newest = newest_complete(folder / "state").manifest
        step = newest.extra["step"] if newest else 0
        problem = f"step {saved} was saved, step {step} is the newest left" if step < saved else bench.problem_after_resume(folder)
        if problem:
            problems[number] = problem
            if stop_at_first:
                break
    return {"states": min(count, len(states)), "possible": len(states), "problems": problems}


def possible_states(bench: Bench) -> list[tuple[dict[str, bytes | None], int]]:
    """Distinct states after a cut before each recorded operation, with the step whose save had ended by then."""
    disk, run_dir = RecordingDisk(), bench.root / "recorded" / "run"

    def note(event: Event) -> None:
        if isinstance(event, CheckpointSaved):
            disk.mark(str(event.step))

    bench.train(run_dir, disk, bus=Bus(note))
    model, saved, found = Model(run_dir), 0, {}
    for number, operation in enumerate([op for op in disk.operations if op.path.name not in UNBOUND[:2]]):
        for content in (*CONTENTS, "any"):
            for share in (0.0, 0.5, 1.0):
                state = model.after_cut(content, share, random.Random(f"{number} {content} {share}"))
                key = hash(frozenset(state.items()))  # bytes remember their hash
                found.setdefault(key, (state, saved))
        if operation.kind == "mark":
            saved = int(operation.path.name)
        model.apply(operation)
    return list(found.values())


def captions(bench: Bench) -> Findings:
    """The same pictures with other captions, in the caches of before, must train other weights."""
    bench.run_straight()
    for path in sorted((bench.model / "pictures").glob("*.txt")):
        path.write_text("a tiny black cross", encoding="utf-8")
    bench.train(bench.root / "edited" / "run")
    found = result_of(bench.root / "edited" / "run")
    is_same = found[WEIGHTS] == bench.straight[WEIGHTS]
    return {"problems": {0: "other captions, same weights"} if is_same else {}}


def faults(bench: Bench) -> Findings:
    """Put each fault in and look for it with the check that should see it; every check first runs without a fault."""
    checks: dict[str, Callable[[Bench], Findings]] = {
        "crash": lambda bench: crash(bench, 12, stop_at_first=True),
        "power": lambda bench: power(bench, 150, stop_at_first=True),
        "captions": captions,
    }
    bench.run_straight()
    caught = {}
    for name, (fault, check) in MUTANTS.items():
        root = bench.root / name
        shutil.copytree(bench.model, root / "model")

        def look(root: Path = root, check: str = check, fault: Callable[[], None] = fault) -> None:
            fault()
            own = Bench(root / "work", root / "model", bench.changes)
            (root / "found.json").write_text(json.dumps(checks[check](own)["problems"]))

        failed = in_child(look)
        problems = {} if failed else json.loads((root / "found.json").read_text())
        caught[name] = f"{check}: {next(iter(problems.values()))}" if problems else ""
        shutil.rmtree(root)
    return {"caught": caught}


def main() -> None:
    """Do the job and print the findings."""
    torch.set_num_threads(1)
    job = json.loads(sys.argv[1])
    root, begun = Path(job["root"]), time.monotonic()
    bench = Bench(root / "work", Path(job["model"]), {**KINDS[job["kind"]], **job.get("changes", {})})
    if job["task"] in ("faults", "captions"):
        findings = {"faults": faults, "captions": captions}[job["task"]](bench)
    elif job["task"] == "crash":
        findings = crash(bench, job["count"], tuple(job["share"]))
    else:
        findings = {"twice": twice, "power": power}[job["task"]](bench, job["count"])
    print(json.dumps({**findings, "seconds": round(time.monotonic() - begun, 1)}))


if __name__ == "__main__":
    main()
