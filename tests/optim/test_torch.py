"""Optimizers of torch by name, and groups of tensors with rates of their own."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fluxsmith.errors import ConfigError
from fluxsmith.optim.groups import Group, as_torch_groups
from fluxsmith.optim.packages import accepted
from fluxsmith.optim.torch import CLASSES, OPTIONS, Config


def trained(optimizer_of: object, steps: int = 5) -> torch.Tensor:
    param = nn.Parameter(torch.linspace(-1, 1, 24).reshape(4, 6))
    optimizer = optimizer_of(param)  # type: ignore[operator]
    for step in range(steps):
        optimizer.zero_grad()
        param.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_each_is_the_class_of_torch(name: str) -> None:
    kind = getattr(torch.optim, CLASSES[name])
    ours = trained(lambda param: Config(type="torch", name=name, lr=1e-2, weight_decay=0.0).build([Group("all", (param,))]))
    theirs = trained(lambda param: kind([param], lr=1e-2, **({} if name == "rprop" else {"weight_decay": 0.0})))
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, trained(lambda param: kind([param], lr=0.0), steps=0))


def test_options_reach_the_class() -> None:
    options = {"momentum": 0.9, "nesterov": True}
    ours = trained(
        lambda param: Config(type="torch", name="sgd", lr=1e-2, weight_decay=0.1, options=options).build([Group("all", (param,))])
    )
    assert torch.equal(ours, trained(lambda param: torch.optim.SGD([param], lr=1e-2, weight_decay=0.1, momentum=0.9, nesterov=True)))


def test_an_unknown_option_is_named_with_those_there_are() -> None:
    with pytest.raises(ValidationError, match="adamw has no option beta: write betas"):
        Config(type="torch", name="adamw", options={"beta": 0.9})
    with pytest.raises(ValidationError, match="sgd has no option xyz: it has momentum, dampening"):
        Config(type="torch", name="sgd", options={"xyz": 1})


def test_a_value_that_the_class_refuses() -> None:
    with pytest.raises(ConfigError, match=r"betas|beta"):
        Config(type="torch", name="adamw", options={"betas": (2.0, 0.9)}).build([Group("all", (nn.Parameter(torch.ones(1)),))])


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_the_listed_options_are_those_of_the_class(name: str) -> None:
    assert set(OPTIONS[name]) == set(accepted(getattr(torch.optim, CLASSES[name])) or ())


def test_groups_keep_name_rate_and_decay() -> None:
    first, second, third = (nn.Parameter(torch.ones(1)) for _ in range(3))
    groups = as_torch_groups(
        [Group("a", (first,)), Group("b", (second,), lr=1e-5), Group("c", (third,), lr=2.0, lr_factor=0.5, weight_decay=0.0)], 1e-3
    )
    assert [(group["name"], group["lr"], group.get("weight_decay")) for group in groups] == [
        ("a", 1e-3, None),
        ("b", 1e-5, None),
        ("c", 1.0, 0.0),
    ]


def test_empty_groups_and_rate_zero_are_left_out() -> None:
    param = nn.Parameter(torch.ones(1))
    assert as_torch_groups([Group("empty", ()), Group("off", (param,), lr=0.0), Group("off2", (param,), lr_factor=0.0)], 1e-3) == []


def test_rates_of_groups_act() -> None:
    slow, fast = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = Config(type="torch", name="sgd", lr=1.0, weight_decay=0).build(
        [Group("slow", (slow,), lr_factor=0.1), Group("fast", (fast,))]
    )
    slow.grad = fast.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(slow, torch.full((3,), -0.1))
    assert torch.equal(fast, torch.full((3,), -1.0))
