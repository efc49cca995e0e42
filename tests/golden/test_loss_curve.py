"""Twenty steps of a LoRA run: the loss of every step. `make golden` renews it; a change needs its reason in the commit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxsmith.config.load import load_config
from fluxsmith.events import Bus
from fluxsmith.train.run import train

CHANGES = {
    "train.steps": 20,
    "train.accumulation": 2,
    "train.ema": {"decay": 0.9},
    "adapter.rank": 4,
    "adapter.dropout": 0.1,
    "schedule": {"name": "cosine", "warmup": 3},
    "data.0.flip": True,
    "data.0.captions": {"dropout": 0.2, "shuffle": True, "separator": " "},
    "cache.text": "off",
}


@pytest.fixture(scope="module")
def curve(tiny_run: Any, golden_section: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("curve")
    changes = {**CHANGES, "model": golden_section, "cache.dir": str(folder / "cache")}
    train(load_config(tiny_run(folder / "run", changes)).config, bus=Bus())
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {"loss": [row["loss_hex"] for row in rows], "grad_norm": [row["grad_norm_hex"] for row in rows]}


def numbers(values: list[str]) -> list[float]:
    return [float.fromhex(text) for text in values]


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_the_curve(curve: dict[str, list[str]], golden: Callable[..., dict[str, Any]], name: str) -> None:
    stored = golden("loss_curve", curve)["values"]
    assert len(stored[name]) == 20
    assert numbers(curve[name]) == pytest.approx(numbers(stored[name]), rel=1e-3)


def test_the_curve_to_the_bit(
    curve: dict[str, list[str]], golden: Callable[..., dict[str, Any]], same_machine: Callable[[dict[str, Any]], None]
) -> None:
    stored = golden("loss_curve", curve)
    same_machine(stored)
    assert curve == stored["values"]


def test_the_curve_is_one(curve: dict[str, list[str]]) -> None:
    """The golden would notice: the losses differ from step to step and are those of an untrained model."""
    losses = numbers(curve["loss"])
    assert len(set(losses)) == 20
    assert 1 < sum(losses) / 20 < 20


def test_files_of_the_golden_are_those_of_the_tests() -> None:
    found = {path.stem for path in Path(__file__).parent.glob("*.json")}
    assert found == {"loss_curve", "latents", "headers"}
