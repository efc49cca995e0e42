"""Every schedule against its formula: warm-up, shape, ends, restarts, lowest rate, lengths as steps and as shares."""

import math
from typing import Any

import pytest
import torch

from fluxsmith.config.schema import ScheduleConfig
from fluxsmith.errors import ConfigError
from fluxsmith.optim.schedules import SHAPES, factor, piecewise, span

NAMES = sorted(SHAPES)


def values(total: int, **options: Any) -> list[float]:
    config = ScheduleConfig(**options)
    return [factor(config, step, total) for step in range(total)]


def test_every_name_of_the_config_has_a_shape() -> None:
    names = ScheduleConfig.model_fields["name"].annotation.__args__  # type: ignore[union-attr]
    assert set(names) == {*SHAPES, "piecewise_constant"}


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
