"""Every schedule against its formula: warm-up, shape, ends, restarts, lowest rate, lengths as steps and as shares.

Those of transformers and diffusers are compared with them over whole runs.
"""

import math
import re
from typing import Any

import pytest
import torch
import transformers
from diffusers.optimization import get_piecewise_constant_schedule
from pydantic import ValidationError

from fluxsmith.config.schema import ScheduleConfig
from fluxsmith.errors import ConfigError
from fluxsmith.optim.schedules import SHAPES, Rates, factor, piecewise, span

NAMES = sorted(SHAPES)


def values(total: int, **options: Any) -> list[float]:
    config = ScheduleConfig(**options)
    return [factor(config, step, total) for step in range(total)]


def test_every_name_of_the_config_has_a_shape() -> None:
    names = ScheduleConfig.model_fields["name"].annotation.__args__  # type: ignore[union-attr]
    assert set(names) == {*SHAPES, "piecewise_constant", "imported"}


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_is_linear_and_reaches_the_full_rate(name: str) -> None:
    got = values(100, name=name, warmup=9)
    assert got[:9] == pytest.approx([step / 10 for step in range(1, 10)])
    assert got[9] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_as_a_share(name: str) -> None:
    assert values(50, name=name, warmup=0.2) == values(50, name=name, warmup=10)


@pytest.mark.parametrize("name", NAMES)
def test_rate_stays_between_its_bounds(name: str) -> None:
    got = values(200, name=name, warmup=20, min_ratio=0.1)
    assert all(0.1 - 1e-12 <= value <= 1 + 1e-12 for value in got[20:])
    assert values(10, name=name)[0] == pytest.approx(1.0)


def test_constant() -> None:
    assert values(10, name="constant") == [1.0] * 10


def test_linear() -> None:
    assert values(8, name="linear") == pytest.approx([1 - step / 8 for step in range(8)])
    assert factor(ScheduleConfig(name="linear"), 8, 8) == 0
    assert factor(ScheduleConfig(name="linear", min_ratio=0.25), 8, 8) == 0.25


def test_linear_equals_torch() -> None:
    param = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([param], lr=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=30)
    for step in range(30):
        assert factor(ScheduleConfig(name="linear"), step, 30) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_cosine_equals_torch() -> None:
    param = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([param], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40, eta_min=0.1)
    for step in range(40):
        assert factor(ScheduleConfig(name="cosine", min_ratio=0.1), step, 40) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        schedule.step()


def test_cosine_of_several_cycles() -> None:
    got = values(40, name="cosine", cycles=3)
    assert got == pytest.approx([max(0.0, 0.5 * (1 + math.cos(3 * math.pi * step / 40))) for step in range(40)])


def test_cosine_restarts_jump_back_to_the_full_rate() -> None:
    got = values(40, name="cosine_restarts", cycles=4)
    assert [got[step] for step in (0, 10, 20, 30)] == pytest.approx([1.0] * 4)
    assert [got[step] for step in (9, 19, 29, 39)] == pytest.approx([0.5 * (1 + math.cos(0.9 * math.pi))] * 4)
    assert factor(ScheduleConfig(name="cosine_restarts", cycles=4), 40, 40) == 0


def test_polynomial() -> None:
    assert values(10, name="polynomial", power=2.0) == pytest.approx([(1 - step / 10) ** 2 for step in range(10)])
    assert values(10, name="polynomial") == values(10, name="linear")


def test_inverse_sqrt() -> None:
    got = values(500, name="inverse_sqrt", warmup=100)
    assert got[100 + 300] == pytest.approx(1 / 2)  # 1 / sqrt(1 + 300 / 100)
    assert values(10, name="inverse_sqrt")[9] == pytest.approx(1 / math.sqrt(1 + 9 / 10_000))


def test_inverse_sqrt_with_a_warm_up_that_is_a_share() -> None:
    assert values(500, name="inverse_sqrt", warmup=0.2) == pytest.approx(values(500, name="inverse_sqrt", warmup=100))


def test_warmup_stable_decay() -> None:
    got = values(100, name="warmup_stable_decay", warmup=10, decay=20)
    assert got[10:81] == [1.0] * 71
    assert got[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 100)])
    assert values(100, name="warmup_stable_decay")[89:] == pytest.approx([1.0, *((100 - step) / 10 for step in range(90, 100))])


def test_decay_as_a_share_is_of_the_run() -> None:
    assert values(100, name="warmup_stable_decay", warmup=20, decay=0.2) == values(100, name="warmup_stable_decay", warmup=20, decay=20)


def test_piecewise() -> None:
    got = values(10, name="piecewise_constant", rules="1:3,0.5:6,0.1")
    assert got == [1, 1, 1, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1]
    assert values(10, name="piecewise_constant", rules="1:6,0.1", warmup=3)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("rules", ["", "1:3", "a:3,1", "1:b,1", "1;3,1", "1:3,x", "1:3:4,1"])
def test_rules_that_cannot_be_read(rules: str) -> None:
    with pytest.raises(ConfigError, match="factor:until_step"):
        piecewise(rules, 0)


def test_span() -> None:
    assert (span(0, 100), span(0.25, 100), span(1, 100), span(30, 100)) == (0, 25, 1, 30)


# ---- transformers and diffusers over whole runs ---------------------------------------------------------------------

LR = 3e-4
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {  # ours, the name there, its arguments
    "constant": ({"name": "constant"}, "constant_with_warmup", {}),
    "linear": ({"name": "linear"}, "linear", {}),
    "cosine": ({"name": "cosine"}, "cosine", {}),
    "cosine, 3 half waves": ({"name": "cosine", "cycles": 3}, "cosine", {"num_cycles": 1.5}),
    "cosine with restarts": ({"name": "cosine_restarts", "cycles": 4}, "cosine_with_restarts", {"num_cycles": 4}),
    "polynomial": ({"name": "polynomial", "min_ratio": 1e-7 / LR}, "polynomial", {}),
    "polynomial, power 2": ({"name": "polynomial", "power": 2, "min_ratio": 1e-5 / LR}, "polynomial", {"power": 2.0, "lr_end": 1e-5}),
    "inverse sqrt": ({"name": "inverse_sqrt"}, "inverse_sqrt", {}),
    "inverse sqrt, timescale": ({"name": "inverse_sqrt", "timescale": 30}, "inverse_sqrt", {"timescale": 30}),
    "cosine with min lr": ({"name": "cosine", "min_ratio": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    "cosine with min lr, 3 half waves": (
        {"name": "cosine", "min_ratio": 0.2, "cycles": 3}, "cosine_with_min_lr", {"min_lr_rate": 0.2, "num_cycles": 1.5}
    ),
    **{
        f"warm-up, stable, {shape} decay": (
            {"name": "warmup_stable_decay", "decay": 25, "decay_shape": shape, "min_ratio": 0.1, "cycles": cycles},
            "warmup_stable_decay",
            {"num_decay_steps": 25, "decay_type": shape, "min_lr_ratio": 0.1, "num_cycles": cycles / 2},
        )
        for shape, cycles in (("linear", 1), ("cosine", 1), ("cosine", 3), ("1-sqrt", 1))
    },
}  # fmt: skip


def rates_of(make: Any, total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=LR)
    schedule, found = make(optimizer), []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.ledger("KS-10")
@pytest.mark.parametrize("warmup", [0, 1, 17])
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, warmup: int) -> None:
    ours, name, arguments = CASES[case]
    total = 120
    expected = rates_of(
        lambda optimizer: transformers.get_scheduler(
            name, optimizer, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=arguments
        ),
        total,
    )
    rates = Rates(ScheduleConfig(**ours, warmup=warmup, warmup_from="zero"), total, [LR])
    assert [rates.at(step)[0] for step in range(total)] == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.ledger("KS-10")
def test_piecewise_equals_diffusers() -> None:
    rules = "1:10,0.1:20,0.01:30,0.005"
    expected = rates_of(lambda optimizer: get_piecewise_constant_schedule(optimizer, rules), 50)
    rates = Rates(ScheduleConfig(name="piecewise_constant", rules=rules), 50, [LR])
    assert [rates.at(step)[0] for step in range(50)] == pytest.approx(expected)


def test_piecewise_does_not_mind_the_order() -> None:
    assert [piecewise("0.5:8,1:4,0.1", step) for step in (0, 4, 8)] == [1, 0.5, 0.1]


def test_warm_up_from_zero_and_from_the_first_rung() -> None:
    assert values(8, name="constant", warmup=4, warmup_from="zero")[:5] == [0, 0.25, 0.5, 0.75, 1]
    assert values(8, name="constant", warmup=4)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])


def test_percentages() -> None:
    assert values(50, name="linear", warmup="20%") == values(50, name="linear", warmup=10)
    assert ScheduleConfig(warmup="5 %").warmup == 0.05
    assert ScheduleConfig(name="warmup_stable_decay", decay="50%").decay == 0.5
    for wrong in ("100%", "-1%", "x%"):
        with pytest.raises(ValidationError):
            ScheduleConfig(warmup=wrong)


# ---- schedule classes -----------------------------------------------------------------------------------------------

CLASSES: dict[str, dict[str, Any]] = {
    "CosineAnnealingLR": {"T_max": 30, "eta_min": 1e-6},
    "CosineAnnealingWarmRestarts": {"T_0": 10, "T_mult": 2},
    "StepLR": {"step_size": 7, "gamma": 0.5},
    "ExponentialLR": {"gamma": 0.97},
    "LinearLR": {"start_factor": 0.25, "total_iters": 12},
    "PolynomialLR": {"total_iters": 40, "power": 2},
    "OneCycleLR": {"max_lr": 1e-3, "total_steps": 60, "cycle_momentum": False},
    "CyclicLR": {"base_lr": 1e-5, "max_lr": 1e-3, "step_size_up": 9, "cycle_momentum": False},
}


@pytest.mark.ledger("KS-10")
@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_torch(name: str) -> None:
    """All groups, each from its own rate."""
    config = ScheduleConfig(name="imported", path=name, options=CLASSES[name])
    rates = Rates(config, 60, [LR, None, 1e-5])
    for column, lr in ((0, LR), (2, 1e-5)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=lr)
        schedule = getattr(torch.optim.lr_scheduler, name)(optimizer, **CLASSES[name])
        for step in range(59):
            assert rates.at(step)[column] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
            assert rates.at(step)[1] is None
            optimizer.step()
            schedule.step()


def test_a_class_begins_after_the_warm_up() -> None:
    config = ScheduleConfig(name="imported", path="StepLR", options={"step_size": 5, "gamma": 0.5}, warmup=4, warmup_from="zero")
    got = [Rates(config, 20, [1.0]).at(step)[0] for step in range(20)]
    assert got == pytest.approx([0, 0.25, 0.5, 0.75] + [1.0] * 5 + [0.5] * 5 + [0.25] * 5 + [0.125])


@pytest.mark.parametrize(
    ("path", "options", "said"),
    [
        ("StepLR", {"gamma": 0.5}, "step_size"),
        ("ReduceLROnPlateau", {}, "metrics"),
        ("OneCycleLR", {"max_lr": 1e-3, "total_steps": 60}, "momentum"),
        ("CyclicLR", {"base_lr": -1.0, "max_lr": 1e-3, "cycle_momentum": False}, "negative"),
        ("OneCycleLR", {"max_lr": 1e-3, "total_steps": 10, "cycle_momentum": False}, "total_steps|total steps|number of total"),
        ("StepLRR", {}, "StepLR"),
    ],
)
def test_classes_that_cannot_be_used(path: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        Rates(ScheduleConfig(name="imported", path=path, options=options), 60, [LR])
    assert re.search(said, str(error.value)), str(error.value)


def test_rates_are_a_pure_function_of_the_step() -> None:
    rates = Rates(ScheduleConfig(name="imported", path="CosineAnnealingLR", options={"T_max": 20}), 40, [1.0])
    forwards = [rates.at(step) for step in range(40)]
    assert [rates.at(step) for step in reversed(range(40))] == forwards[::-1]
