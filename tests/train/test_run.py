"""A run as its user sees it: the folder and its lock, its length, states and files, and resumes that are refused or noted."""

from collections.abc import Callable

import pytest
import tiny_run
import torch
from ran import Go, furthest, same

from fluxsmith.config.load import load_config
from fluxsmith.config.schema import RunConfig
from fluxsmith.events import CheckpointSaved, RunEnded, RunFailed, RunStarted, StepEnded, WeightsSaved
from fluxsmith.io.durable import RunLock
from fluxsmith.io.safetensors import open_weights
from fluxsmith.train.sinks.jsonl import read_events

LORA = {**tiny_run.LORA, "adapter.targets": "attention"}


def test_what_a_run_leaves(go: Go) -> None:
    ran = go({"checkpoint.every": 2})
    assert ran.error is None
    names = {path.name for path in ran.folder.iterdir()}
    assert names == {"run.toml", "events.jsonl", "metrics.jsonl", "state", "weights", "report.html", "run.lock"}
    assert [row["step"] for row in ran.rows] == [1, 2, 3, 4]
    assert ran.states == [2, 4]
    assert sorted(path.name for path in (ran.folder / "weights").iterdir()) == ["w-step00000002.safetensors", "w.safetensors"]
    assert [event.step for event in ran.of(StepEnded)] == [1, 2, 3, 4]
    assert [event.step for event in ran.of(CheckpointSaved)] == [2, 4]
    assert [event.step for event in ran.of(WeightsSaved)] == [2, 4]
    assert not ran.of(RunEnded)[0].stopped
    assert load_config(ran.folder / "run.toml").config.train.steps == 4


def test_the_same_config_gives_the_same_bits(go: Go) -> None:
    one, other = go({}, "one"), go({}, "other")
    assert one.losses == other.losses
    assert same(one.weights, other.weights)
    assert not same(one.weights, go({"train.seed": 6}, "third").weights)


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_training_moves_what_it_should_and_lowers_the_loss(go: Go, changes: tiny_run.Options) -> None:
    noise = {"noise.sampling": "uniform", "noise.min_sigma": 0.4, "noise.max_sigma": 0.6}
    ran = go({**changes, **noise, "train.steps": 40, "train.accumulation": 1, "optim.lr": 3e-2 if changes else 1e-3})
    losses = [float.fromhex(loss) for loss in ran.losses]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert all(("adapter" in name or "lora" in name or changes == {}) or name.startswith("dit.") for name in ran.weights)


@pytest.mark.ledger("KS-12")
def test_length_by_epochs(go: Go) -> None:
    """13 pictures of two sizes, accumulation 2: 7 steps an epoch."""
    ran = go({"train.steps": None, "train.epochs": 1})
    assert ran.of(RunStarted)[0].total_steps == 7
    assert [row["step"] for row in ran.rows] == list(range(1, 8))
    steps = go({"train.steps": 7}, "steps")
    assert same(ran.weights, steps.weights)


@pytest.mark.ledger("KS-12")
@pytest.mark.ledger("KS-07")
def test_states_by_epochs(go: Go) -> None:
    ran = go({"train.steps": None, "train.epochs": 3, "checkpoint.every_epochs": 1, "checkpoint.keep": 9})
    assert ran.states == [7, 13, 20]
    assert [event.epoch for event in ran.of(StepEnded)][::6] == [1, 1, 2, 3]


@pytest.mark.ledger("ST-40")
@pytest.mark.ledger("KS-07")
def test_old_states_go_and_weights_stay(go: Go) -> None:
    ran = go({"train.steps": 6, "checkpoint.every": 1, "checkpoint.keep": 2})
    assert ran.states == [5, 6]
    assert len(list((ran.folder / "weights").iterdir())) == 6


@pytest.mark.ledger("KS-07")
def test_old_weights_go_when_asked(go: Go) -> None:
    ran = go({"train.steps": 6, "checkpoint.every": 1, "checkpoint.keep_weights": 2})
    names = sorted(path.name for path in (ran.folder / "weights").iterdir())
    assert names == ["w-step00000004.safetensors", "w-step00000005.safetensors", "w.safetensors"]


@pytest.mark.ledger("KS-07")
@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_type_of_the_file(go: Go, name: str, dtype: torch.dtype) -> None:
    ran = go({"checkpoint.dtype": name, "train.ema": None})
    with open_weights(ran.folder / "weights" / "w.safetensors") as weights:
        stored = {f"dit.{key}": weights.tensor(key) for key in weights}
    assert all(value.dtype == dtype for value in stored.values())
    assert same(stored, {key: value.to(dtype) for key, value in ran.weights.items()})


@pytest.mark.ledger("ST-29")
def test_the_file_holds_the_average(go: Go) -> None:
    ran = go({})
    with open_weights(ran.folder / "weights" / "w.safetensors") as weights:
        stored = {f"dit.{key}": weights.tensor(key) for key in weights}
    assert same(stored, ran.tensors(4, "ema"))
    assert not same(stored, ran.weights)


def test_a_trained_model_is_a_model(go: Go, tiny_model: object) -> None:
    """What a full fine-tune writes is the transformer of the next run."""
    first = go({"train.ema": None})
    second = go({"model.path": str(first.folder / "weights" / "w.safetensors"), "train.steps": 1, "optim.lr": 1e-12}, "second")
    assert second.error is None
    assert furthest(first.weights, second.weights) < 1e-6


def test_several_components(go: Go) -> None:
    ran = go({"train.components": ["dit", "clip_l"], "cache.text": "off", "train.ema": None})
    assert ran.error is None
    names = sorted(path.name for path in (ran.folder / "weights").iterdir())
    assert names == ["w-clip_l.safetensors", "w.safetensors"]
    assert {name.split(".")[0] for name in ran.weights} == {"dit", "clip_l"}
    again = {
        "model.clip_l": str(ran.folder / "weights" / "w-clip_l.safetensors"),
        "model.path": str(ran.folder / "weights" / "w.safetensors"),
    }
    assert go({**again, "train.steps": 1}, "again").error is None


# ---- folders ------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_left_alone(go: Go) -> None:
    first = go({})
    second = go({})
    assert second.error is not None
    assert second.error.exit_code == 2
    assert "--resume" in str(second.error)
    assert same(first.weights, second.weights)


def test_resume_begins_where_there_is_nothing(go: Go) -> None:
    assert go({}, resume=True).error is None


def test_a_run_that_died_before_its_first_state_begins_again(go: Go) -> None:
    first = go({})
    for path in (first.folder / "state").iterdir():
        path.rename(first.folder / f"gone-{path.name}")
    second = go({})
    assert second.error is None
    assert [row["step"] for row in second.rows] == [1, 2, 3, 4]


def test_a_finished_run_has_nothing_to_do(go: Go) -> None:
    first = go({})
    before = (first.folder / "metrics.jsonl").read_bytes()
    again = go({}, resume=True)
    assert again.error is None
    assert again.of(StepEnded) == []
    assert (again.folder / "metrics.jsonl").read_bytes() == before


def test_two_runs_in_one_folder(go: Go, run_config: Callable[..., RunConfig]) -> None:
    with RunLock(run_config().run.dir):
        ran = go({})
    assert ran.error is not None
    assert ran.error.exit_code == 8
    assert "in use by pid" in str(ran.error)
    assert go({}).error is None


def test_no_state_is_complete(go: Go) -> None:
    """Starting over in silence would throw the run away."""
    first = go({"checkpoint.every": 2})
    for path in (first.folder / "state").glob("*/weights.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    again = go({"checkpoint.every": 2}, resume=True)
    assert again.error is not None
    assert again.error.exit_code == 4
    assert len(again.error.lines()) == 2
    assert "step-000002" in "".join(again.error.lines())


def test_the_newest_complete_state_is_used_and_the_others_are_named(go: Go) -> None:
    straight = go({"checkpoint.every": 2}, "straight")
    first = go({"checkpoint.every": 2})
    damaged = first.folder / "state" / "step-000004" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = go({"checkpoint.every": 2}, resume=True)
    assert "step-000004" in again.warnings
    assert again.of(RunStarted)[0].start_step == 2
    assert same(again.weights, straight.weights)


def test_litter_of_a_killed_run_goes(go: Go) -> None:
    first = go({"checkpoint.every": 2})
    dead = f".{'x'}.999999999-00000000.tmp"
    for folder in ("", "state", "weights"):
        (first.folder / folder / dead).write_bytes(b"x")
    go({"checkpoint.every": 2}, resume=True)
    assert list(first.folder.rglob(".*")) == []


# ---- resumes ------------------------------------------------------------------------------------------------------


def test_a_longer_run_goes_on_with_a_note(go: Go) -> None:
    go({"schedule.name": "constant"})
    more = go({"schedule.name": "constant", "train.steps": 6}, resume=True)
    assert more.error is None
    assert "from step 4 the schedule differs: train.steps" in more.warnings
    straight = go({"schedule.name": "constant", "train.steps": 6}, "straight")
    assert more.losses == straight.losses
    assert same(more.weights, straight.weights)


def test_another_run_is_refused_and_leaves_everything_as_it_was(go: Go) -> None:
    first = go({})
    before = {
        path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file() and path.name not in ("events.jsonl", "report.html")
    }
    other = go({"train.steps": 6, "train.seed": 9, "noise.sampling": "uniform"}, resume=True)
    assert other.error is not None
    assert other.error.exit_code == 2
    lines = other.error.lines()
    assert len(lines) == 2
    assert "train.seed was 5 when the run was saved and is 9 now" in "".join(lines)
    assert {path: path.read_bytes() for path in before} == before
    assert other.of(RunFailed)[0].exit_code == 2


def test_an_allowed_change_goes_on_and_is_remembered(go: Go) -> None:
    go({})
    changed = go({"train.steps": 6, "optim.weight_decay": 0.5}, resume=True, allow=["optim.weight_decay"])
    assert changed.error is None
    assert "not exact from step 4: optim.weight_decay" in changed.warnings
    again = go({"train.steps": 8, "optim.weight_decay": 0.25}, resume=True, allow=["optim"])
    state = (again.folder / "state" / "step-000008" / "state.json").read_text()
    assert '"exact_from": 4' in state
    assert load_config(again.folder / "run.toml").config.train.steps == 8


def test_moved_files_are_the_same_files(go: Go, tiny_model: object, run_config: Callable[..., RunConfig]) -> None:
    straight = go({"train.steps": 6, "schedule.name": "constant"}, "straight")
    go({"schedule.name": "constant"})
    moved = run_config().run.dir.parent / "elsewhere"
    moved.symlink_to(str(tiny_model), target_is_directory=True)
    places = {"model.path": str(moved / "dit.safetensors"), "data.0.path": str(moved / "pictures")}
    again = go({"train.steps": 6, "schedule.name": "constant", **places}, resume=True)
    assert again.error is None
    assert "not exact" not in again.warnings
    assert same(again.weights, straight.weights)


def test_an_average_can_begin_later(go: Go) -> None:
    go({"train.ema": None})
    later = go({"train.steps": 6}, resume=True, allow=["train.ema"])
    assert later.error is None
    assert furthest(later.tensors(6, "ema"), later.weights) < 0.01


def test_other_files_under_the_same_name_are_noticed(go: Go, run_config: Callable[..., RunConfig], tiny_model: object) -> None:
    go({})
    other = tiny_run.write_model(run_config().run.dir.parent / "other", seed=3)
    ran = go({"train.steps": 6, "model.path": str(other / "dit.safetensors")}, resume=True)
    assert ran.error is not None
    assert "facts.models.dit" in "".join(ran.error.lines())


def test_rows_that_somebody_removed_are_told(go: Go) -> None:
    first = go({})
    (first.folder / "metrics.jsonl").unlink()
    again = go({"train.steps": 6}, resume=True)
    assert again.error is None
    assert "lacks rows" in again.warnings
    assert [row["step"] for row in again.rows] == [5, 6]


def test_a_torn_event_does_not_swallow_the_next(go: Go) -> None:
    first = go({})
    path = first.folder / "events.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    go({"train.steps": 6}, resume=True)
    kinds = [event["event"] for event in read_events(path)]
    assert kinds.count("RunStarted") == 2
    assert kinds[-1] == "RunEnded"


def test_weights_that_a_kill_left_out_are_written_on_resume(go: Go) -> None:
    """A kill between the state of step 2 and its weights file."""
    changes = {"checkpoint.every": 2, "checkpoint.keep": 9}
    first = go(changes)
    file = first.folder / "weights" / "w-step00000002.safetensors"
    tensors = file.read_bytes()[-2000:]
    for path in (*first.folder.glob("state/step-000004/*"), *first.folder.glob("weights/*")):
        path.unlink()
    (first.folder / "state" / "step-000004").rmdir()
    go(changes, resume=True)
    assert file.read_bytes()[-2000:] == tensors
