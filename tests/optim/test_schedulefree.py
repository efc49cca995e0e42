"""Schedule-free optimizers: the numbers of another implementation, the average, warm-ups from 0, and a wrapper that works with all."""

from typing import Any

import pytest
import pytorch_optimizer
import schedulefree
import torch
from torch import nn

from fluxsmith.errors import ConfigError
from fluxsmith.optim.groups import Group
from fluxsmith.optim.schedulefree import Config


def start() -> nn.Parameter:
    return nn.Parameter(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)))


def run(param: nn.Parameter, optimizer: Any, steps: int = 20) -> None:
    for step in range(steps):
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step)) + 0.5
        optimizer.step()


@pytest.mark.ledger("KS-09")
@pytest.mark.parametrize(("name", "other"), [("adamw", "ScheduleFreeAdamW"), ("radam", "ScheduleFreeRAdam"), ("sgd", "ScheduleFreeSGD")])
def test_equals_another_implementation(name: str, other: str) -> None:
    ours, theirs = start(), start()
    optimizer = Config(type="schedulefree", name=name, lr=0.02, weight_decay=0.01).build([Group("all", (ours,))])
    reference = getattr(pytorch_optimizer, other)([theirs], lr=0.02, weight_decay=0.01)
    reference.train()
    for switch in ("train", "eval"):
        run(ours, optimizer)
        run(theirs, reference)
        getattr(optimizer, switch)()
        getattr(reference, switch)()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.8, "r": 1.0, "weight_lr_power": 1.0}, {"weight_decay_at_y": 0.1}], ids=str)
def test_wrapper_equals_the_original(options: dict[str, float]) -> None:
    """Around SGD, which the original can be put around."""
    ours, theirs = start(), start()
    optimizer = Config(type="schedulefree", name="wrapper", base="sgd", lr=0.02, weight_decay=0.01, options=options)
    made: Any = optimizer.build([Group("all", (ours,))])
    reference = schedulefree.ScheduleFreeWrapper(torch.optim.SGD([theirs], lr=0.02, weight_decay=0.01), **options)
    reference.train()
    for switch in ("train", "eval", "train"):
        run(ours, made)
        run(theirs, reference)
        getattr(made, switch)()
        getattr(reference, switch)()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        getattr(made, "train")()  # noqa: B009  both again in training
        reference.train()


def test_wrapper_around_adam_without_momentum_is_near_schedule_free_adam() -> None:
    ours, theirs = start(), start()
    inner = Config(
        type="schedulefree", name="wrapper", base="adam", lr=0.02, base_options={"betas": (0.0, 0.999)}, options={"momentum": 0.9}
    )
    run(ours, inner.build([Group("all", (ours,))]))
    run(theirs, Config(type="schedulefree", name="adamw", lr=0.02).build([Group("all", (theirs,))]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "sgd", "wrapper"])
def test_a_warm_up_may_begin_at_0(name: str) -> None:
    param = start()
    optimizer = Config(type="schedulefree", name=name, lr=0.02).build([Group("all", (param,))])
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * step / 5
        run(param, optimizer, 1)
        assert torch.equal(param, start()) is (step == 0)
    assert bool(param.isfinite().all())


def test_it_begins_in_training() -> None:
    param = start()
    run(param, Config(type="schedulefree").build([Group("all", (param,))]), 1)  # the class refuses a step otherwise
    assert not torch.equal(param, start())


def test_momentum_out_of_range() -> None:
    with pytest.raises(ConfigError, match="momentum"):
        Config(type="schedulefree", name="wrapper", options={"momentum": 0.0}).build([Group("all", (start(),))])
