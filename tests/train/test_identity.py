"""Which changes a resume refuses, notes, or does not care about, and how the refusal reads."""

from collections.abc import Callable

import pytest
import torch

from fluxsmith.config.schema import RunConfig
from fluxsmith.errors import ConfigError
from fluxsmith.train.identity import check_identity, flatten, identity_of, machine_facts

Make = Callable[..., RunConfig]
FACTS = {"data": "d1", "models": {"dit": "m1", "ae": "m2"}, "world_size": 1, "torch": "2", "device": "cpu", "threads": 1}


def changed(run_config: Make, changes: dict[str, object], facts: dict[str, object] | None = None) -> tuple[list[str], list[str]]:
    """(identity keys, schedule keys) that differ from a plain run's."""
    one = identity_of(run_config(), FACTS)
    other = identity_of(run_config(changes), {**FACTS, **(facts or {})})
    differing = [sorted(key for key in {*a, *b} if a.get(key) != b.get(key)) for a, b in zip(one, other, strict=True)]
    return differing[0], differing[1]


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"train.seed": 6}, ["train.seed"]),
        ({"train.accumulation": 3}, ["train.accumulation"]),
        ({"train.precision": "bf16"}, ["train.precision"]),
        ({"train.weights_dtype": "bf16"}, ["train.weights_dtype"]),
        ({"train.ema": {"decay": 0.5}}, ["train.ema.decay"]),
        ({"train.max_grad_norm": 0}, ["train.max_grad_norm"]),
        ({"optim.weight_decay": 0.5}, ["optim.weight_decay"]),
        ({"noise.sampling": "uniform"}, ["noise.sampling"]),
        ({"noise.guidance": [1.0, 3.0]}, ["noise.guidance"]),
        ({"data.0.batch_size": 2}, ["data.0.batch_size"]),
        ({"data.0.captions": {"dropout": 0.5}, "cache.text": "off"}, ["data.0.captions.dropout"]),
        ({"memory.compile": True}, ["memory.compile"]),
        ({"model.t5_length": 12}, ["model.t5_length"]),
    ],
)
def test_what_the_run_is(run_config: Make, changes: dict[str, object], keys: list[str]) -> None:
    assert changed(run_config, changes) == (keys, [])


def test_an_adapter_and_its_options_are_what_the_run_is(run_config: Make) -> None:
    identity, _ = changed(run_config, {"adapter": {"type": "lora", "rank": 4}})
    assert {"adapter.type", "adapter.rank"} <= set(identity)


@pytest.mark.parametrize("fact", [{"data": "d2"}, {"models": {"dit": "m3", "ae": "m2"}}, {"world_size": 2}, {"threads": 2}, {"torch": "3"}])
def test_what_the_bits_depend_on(run_config: Make, fact: dict[str, object]) -> None:
    identity, schedule = changed(run_config, {}, fact)
    assert len(identity) == 1
    assert identity[0].startswith(f"facts.{next(iter(fact))}")
    assert schedule == []


@pytest.mark.parametrize(
    "changes", [{"train.steps": 9}, {"train.steps": None, "train.epochs": 2}, {"schedule.name": "linear"}, {"optim.lr": 0.5}]
)
def test_what_may_change_with_a_note(run_config: Make, changes: dict[str, object]) -> None:
    identity, schedule = changed(run_config, changes)
    assert identity == []
    assert schedule


@pytest.mark.parametrize(
    "changes",
    [
        {"run.name": "other"},
        {"checkpoint.every": 7, "checkpoint.keep": 9, "checkpoint.dtype": "bf16"},
        {"sample": [{"prompt": "a red circle", "width": 32, "height": 32}]},
        {"cache.batch_size": 1},
        {"train.dry_step": False},
        {"memory.checkpointing": True},
        {"model.path": "elsewhere.safetensors", "data.0.path": "elsewhere", "data.0.name": "other"},
    ],
)
def test_what_nobody_cares_about(run_config: Make, changes: dict[str, object]) -> None:
    """Files that moved are the same files: their digests are among the facts."""
    assert changed(run_config, changes) == ([], [])


def test_the_refusal_lists_every_difference_with_its_cure() -> None:
    with pytest.raises(ConfigError) as caught:
        check_identity({"train.seed": 1, "adapter.rank": 4, "same": 0}, {"train.seed": 2, "adapter.rank": 8, "same": 0, "new": "x"}, ())
    lines = caught.value.lines()
    assert len(lines) == 3
    assert "adapter.rank was 4 when the run was saved and is 8 now" in lines[0]
    assert "--allow-change adapter.rank" in lines[0]
    assert caught.value.exit_code == 2


def test_allowed_changes() -> None:
    saved, now = {"train.seed": 1, "data.0.repeats": 1, "data.0.flip": False}, {"train.seed": 2, "data.0.repeats": 2, "data.0.flip": False}
    assert check_identity(saved, now, ["train.seed", "data"]) == ["data.0.repeats", "train.seed"]
    with pytest.raises(ConfigError, match="exactly"):
        check_identity(saved, now, ["train.see", "dat"])


def test_flattening_keeps_empty_and_plain_lists() -> None:
    assert flatten({"a": {"b": [1, 2], "c": {}}, "d": [{"e": 1}, {"e": 2}], "f": []}) == {
        "a.b": [1, 2], "a.c": {}, "d.0.e": 1, "d.1.e": 2, "f": [],
    }  # fmt: skip


def test_threads_count_on_the_cpu() -> None:
    assert machine_facts(torch.device("cpu"))["threads"] == torch.get_num_threads()
