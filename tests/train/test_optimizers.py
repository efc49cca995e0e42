"""Optimizers and schedules inside the loop: a cut run is the straight one, and the log tells the rate that was used."""

import sys
from typing import Any

import pytest
from ran import Go, same

from fluxsmith.events import PhaseStarted

CHANGES: dict[str, Any] = {"train.max_grad_norm": 1.0, "checkpoint.every": 2, "train.steps": 4}
WARM = {"schedule": {"warmup": 2, "warmup_from": "zero"}}
RUNS: dict[str, dict[str, Any]] = {  # no schedule depends on the length, so that a shorter run is a cut one
    "its own rate": {"optim": {"type": "adafactor", "options": {"relative_step": True, "scale_parameter": True}}, "schedule": {}},
    "the recipe": {"optim": {"type": "adafactor", "lr": 1e-3}, "schedule": {"warmup": 2}},
    "prodigy": {"optim": {"type": "prodigy", "options": {"d0": 1e-3, "slice_p": 3}}, **WARM},
    "d-adaptation": {"optim": {"type": "dadapt", "name": "sgd", "options": {"d0": 1e-3}}, **WARM},
    "schedule-free": {"optim": {"type": "schedulefree", "lr": 1e-3}, **WARM},
    "schedule-free around rmsprop": {"optim": {"type": "schedulefree", "name": "wrapper", "base": "rmsprop", "lr": 1e-3}, **WARM},
    "prodigy and schedule-free": {"optim": {"type": "prodigy_plus", "options": {"d0": 1e-3}}, "schedule": {}},
    "8 bit": {"optim": {"type": "bnb", "lr": 1e-3, "options": {"min_8bit_size": 64}}, "schedule": {"name": "inverse_sqrt", "timescale": 3}},
    "soap": {"optim": {"type": "pytorch_optimizer", "name": "soap", "lr": 1e-3, "options": {"precondition_frequency": 1}}, "schedule": {}},
    "a schedule class": {
        "optim": {"type": "lion", "lr": 1e-3},
        "schedule": {"name": "imported", "path": "StepLR", "options": {"step_size": 1, "gamma": 0.5}},
    },
}


@pytest.mark.ledger("FS-05")
@pytest.mark.ledger("KS-09")
@pytest.mark.parametrize("name", RUNS)
def test_a_cut_run_is_the_straight_one(go: Go, name: str) -> None:
    changes = {**CHANGES, **RUNS[name]}
    straight = go(changes, "straight")
    assert straight.error is None
    go({**changes, "train.steps": 2}, "cut")
    again = go(changes, "cut", resume=True)
    assert again.error is None
    assert same(straight.weights, again.weights)
    assert [row["loss_hex"] for row in straight.rows] == [row["loss_hex"] for row in again.rows]


@pytest.mark.ledger("KS-10")
def test_the_log_tells_the_rate(go: Go) -> None:
    rates = [row["lr"] for row in go({**CHANGES, **RUNS["a schedule class"]}, "class").rows]
    assert rates == pytest.approx([1e-3, 5e-4, 2.5e-4, 1.25e-4])
    rates = [row["lr"] for row in go({**CHANGES, **RUNS["prodigy"]}, "prodigy").rows]
    assert rates[:2] == [0, pytest.approx(5e-4)]
    relative = {"optim": {"type": "adafactor", "options": {"relative_step": True, "warmup_init": True}}, "schedule": {}}
    rates = [row["lr"] for row in go({**CHANGES, **relative}, "relative").rows]
    assert rates == pytest.approx([1e-6, 2e-6, 3e-6, 4e-6])


MODULES = {
    "bnb": "bitsandbytes.optim",
    "dadapt": "dadaptation",
    "schedulefree": "schedulefree",
    "pytorch_optimizer": "pytorch_optimizer",
    "optimi": "optimi",
    "prodigy_plus": "prodigyplus",
}


@pytest.mark.ledger("KS-09")
@pytest.mark.parametrize("kind", MODULES)
def test_a_missing_package_is_told_before_anything_is_loaded(go: Go, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setitem(sys.modules, MODULES[kind], None)
    ran = go({**CHANGES, "optim": {"type": kind}})
    assert ran.error is not None
    assert "pip install 'fluxsmith[optim]'" in str(ran.error)
    assert [event.detail for event in ran.of(PhaseStarted)] == ["reading headers"]
