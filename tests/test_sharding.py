"""One model over two processes trains what one process does: losses, norms, weights, averages, samples, and states for any number of them.

The two processes are started once and go through all runs; what one process does is trained here.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from group import environment, torchrun
from ran import Ran, furthest

from fluxsmith.config.dump import to_toml
from fluxsmith.events import Bus, Event, ValidationEnded, Warned
from fluxsmith.io.safetensors import open_weights
from fluxsmith.train.run import train

TOLERANCE = 1e-6  # the sum of gradients has another order
DRIVER = Path(__file__).parent / "support" / "group_runs.py"
BASE = {
    "train.steps": 4, "train.accumulation": 2, "train.max_grad_norm": 0.05, "checkpoint.every": 2, "run.name": "w",
    "schedule.name": "constant", "schedule.warmup": 0,
}  # fmt: skip
FULL = {"distributed.shard": "full"}
PICTURES = {"sample": [{"prompt": "a red circle", "width": 32, "height": 32, "steps": 2}], "validation": {"every": 2, "share": 0.2}}
RUNS: dict[str, dict[str, Any]] = {
    "full": {**FULL, **PICTURES},
    "grads": {"distributed.shard": "grads", "distributed.checkpoint": "full", "memory.checkpointing": True, "train.ema": None},
    "offload": {
        **FULL,
        "distributed.cpu_offload": True,
        "train.steps": 2,
        "optim": {"type": "schedulefree", "lr": 1e-3},
        "train.ema": None,
    },
    "adapter": {
        **FULL,
        **tiny_run.LORA,
        "train.steps": 2,
        "memory.checkpointing": True,
        "memory.checkpointing_plan": {"offloaded": 1, "selective": 1},
    },
    "bf16": {**FULL, "distributed.gather": "bf16", "train.precision": "bf16", "train.steps": 2},
    "copies": {},  # each process holds all of it
}

pytestmark = [pytest.mark.timeout(600), pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")]


class Place:
    """Folders, and the runs in them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = tiny_run.prepare_files(root / "tiny")
        self.done: dict[str, Ran] = {}

    def config(self, name: str, changes: dict[str, Any]) -> Path:
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "run.toml"
        path.write_text(to_toml(tiny_run.config(self.model, folder / "run", {**BASE, **changes})))
        return path

    def alone(self, changes: dict[str, Any]) -> Ran:
        """The same in this process, once."""
        key = repr(changes)
        if key not in self.done:
            self.done[key] = self.here(f"alone {len(self.done)}", changes)
        return self.done[key]

    def here(self, name: str, changes: dict[str, Any], *, resume: bool = False) -> Ran:
        """In this process, with twice the accumulation."""
        changes = {key: value for key, value in changes.items() if not key.startswith("distributed")}
        ran = Ran(self.root / name / "run")
        config = tiny_run.config(self.model, ran.folder, {**BASE, "train.accumulation": 4, **changes})
        train(config, resume=resume, bus=Bus(ran.events.append))
        return ran

    def group(self, name: str) -> Ran:
        """What two processes did."""
        return Ran(self.root / name / "run")

    def cut(self, name: str, target: str) -> None:
        """A copy of a run as it was after step 2."""
        shutil.copytree(self.root / name / "run", self.root / target / "run")
        shutil.rmtree(self.root / target / "run" / "state" / "step-000004")
        shutil.rmtree(self.root / target / "run" / "weights")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """All runs of the group are done."""
    made = Place(tmp_path_factory.mktemp("sharding"))
    made.here("from one", {"train.steps": 2})
    runs = [[str(made.config(name, changes)), False] for name, changes in RUNS.items()]
    runs += [[str(made.config("from copies", {"train.steps": 2})), False]]
    later = {"from one": FULL, "from copies": {**FULL, "distributed.checkpoint": "full"}}
    for name, changes in later.items():
        path = made.config(f"{name} again", {**changes, "run.dir": str(made.root / name / "run")})
        runs += [[str(path), True]]
    (made.root / "runs.json").write_text(json.dumps(runs))
    words = [*torchrun(2), str(DRIVER), str(made.root / "runs.json")]
    done = subprocess.run(words, env=environment(), text=True, capture_output=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.read_text() for path in made.root.glob("*/error-*.txt")] == []
    return made


def exported(ran: Ran) -> dict[str, torch.Tensor]:
    with open_weights(ran.folder / "weights" / "w.safetensors") as file:
        return {name: file.tensor(name) for name in file}


def whole(ran: Ran, step: int, kind: str = "weights") -> dict[str, torch.Tensor]:
    """Tensors of a state, put together from the rows of its files."""
    files = sorted((ran.folder / "state" / f"step-{step:06d}").glob(f"{kind}-rank*.safetensors"))
    parts = [open_weights(path) for path in files]
    return {name: torch.cat([part.tensor(name) for part in parts if name in part]) for name in parts[0]}


@pytest.mark.ledger("DS-35")
@pytest.mark.ledger("ST-32")
@pytest.mark.parametrize("name", ["full", "grads", "offload", "adapter", "copies"])
def test_two_processes_equal_one_with_twice_the_accumulation(place: Place, name: str) -> None:
    """The loss, the norm that is clipped, and the file of the end, which is the whole model under its own names. Copies are equal too."""
    one, two = place.alone(RUNS[name]), place.group(name)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in two.rows] == pytest.approx([row[key] for row in one.rows], rel=1e-5)
    assert all(row["grad_norm"] > BASE["train.max_grad_norm"] for row in one.rows), "every step was clipped"
    assert furthest(exported(one), exported(two)) < TOLERANCE
    if name == "copies":
        assert furthest(one.weights, two.weights) < TOLERANCE
        assert furthest(one.tensors(4, "ema"), two.tensors(4, "ema")) < TOLERANCE
    if name == "full":
        assert furthest(one.weights, whole(two, 4)) < TOLERANCE
        assert furthest(one.tensors(4, "ema"), whole(two, 4, "ema")) < TOLERANCE


def test_states_hold_the_rows_of_each_or_all_in_one_file(place: Place) -> None:
    names = {name: sorted(p.name for p in (place.group(name).folder / "state" / "step-000004").iterdir()) for name in ("full", "grads")}
    parts = [f"{kind}-rank000{rank}-of-0002.safetensors" for kind in ("ema", "optimizer", "weights") for rank in (1, 2)]
    assert names["full"] == sorted(["MANIFEST.json", *parts, "state.json"])
    assert names["grads"] == ["MANIFEST.json", "optimizer.safetensors", "state.json", "weights.safetensors"]
    sizes = [path.stat().st_size for path in (place.group("full").folder / "state" / "step-000004").glob("weights-rank*")]
    assert max(sizes) < 1.2 * min(sizes)
    assert place.group("adapter").tensors(2).keys(), "an adapter is whole on each card: its state is an ordinary one"


def test_samples_and_validation_are_those_of_one_process(place: Place) -> None:
    one, two = place.alone(RUNS["full"]), place.group("full")
    pictures = [sorted(path.name for path in (ran.folder / "samples").iterdir()) for ran in (one, two)]
    assert pictures[0] == pictures[1] == ["step-000000_p00_s42.png", "step-000004_p00_s42.png"]
    losses = [event.loss for event in one.of(ValidationEnded)]
    rows = [json.loads(line) for line in (two.folder / "events.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if row["event"] == "ValidationEnded"] == pytest.approx(losses, rel=1e-5)


def test_weights_that_travel_in_bf16_stay_near(place: Place) -> None:
    one, two = place.alone(RUNS["bf16"]), place.group("bf16")
    assert 0 < furthest(exported(one), exported(two)) < 5e-3
    assert [row["loss"] for row in two.rows] == pytest.approx([row["loss"] for row in one.rows], rel=2e-2)


@pytest.mark.parametrize("name", ["full", "grads", "copies"])
def test_one_process_continues_what_two_began(place: Place, name: str) -> None:
    """From shares, from shares saved as a whole, and from copies."""
    place.cut(name, f"{name} cut")
    ran = place.here(f"{name} cut", RUNS[name], resume=True)
    straight = place.group(name)
    assert furthest(exported(ran), exported(straight)) < TOLERANCE
    assert [row["step"] for row in ran.rows] == [1, 2, 3, 4]
    said = " ".join(event.message for event in ran.of(Warned))
    assert "the run is not exact from step 2" in said
    assert "facts.world_size" in said


@pytest.mark.parametrize("name", ["from one", "from copies"])
def test_two_processes_continue_what_was_begun_otherwise(place: Place, name: str) -> None:
    straight = place.alone({})
    ran = place.group(name)
    assert [row["step"] for row in ran.rows] == [1, 2, 3, 4]
    assert furthest(exported(ran), exported(straight)) < TOLERANCE
    assert "distributed.shard" in (place.root / f"{name} again" / "warnings.txt").read_text()


def test_alone_it_has_no_effect_and_says_so(place: Place) -> None:
    path = tiny_run.config(place.model, place.root / "lonely" / "run", {**BASE, "train.steps": 1, **FULL})
    events: list[Event] = []
    train(path, bus=Bus(events.append))
    assert any("no effect in one process" in event.message for event in events if isinstance(event, Warned))
