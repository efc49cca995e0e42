"""D-Adaptation: the estimate grows to a useful rate, one rate for all groups, the classes sd-scripts' names mean."""

import pytest
import pytorch_optimizer
import torch
from torch import nn

from fluxsmith.errors import ConfigError
from fluxsmith.optim.dadapt import CLASSES, Config
from fluxsmith.optim.groups import Group


def run(param: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        param.grad = param.detach() - 3 + 0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()


def start() -> nn.Parameter:
    return nn.Parameter(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)))


@pytest.mark.ledger("KS-09")
@pytest.mark.parametrize("name", CLASSES)
def test_the_rate_is_found(name: str) -> None:
    param = start()
    optimizer = Config(type="dadapt", name=name).build([Group("all", (param,))])
    assert type(optimizer).__name__ == CLASSES[name][1]
    run(param, optimizer, 100)
    assert optimizer.param_groups[0]["d"] > 1e-4
    assert (param - 3).abs().mean().item() < 0.95 * (start() - 3).abs().mean().item()


@pytest.mark.parametrize(("name", "other"), [("adam", "DAdaptAdam"), ("adagrad", "DAdaptAdaGrad"), ("sgd", "DAdaptSGD")])
def test_equals_another_implementation(name: str, other: str) -> None:
    ours, theirs = start(), start()
    options = {"adam": {}, "adagrad": {"eps": 1e-6}, "sgd": {"momentum": 0.9}}[name]
    run(ours, Config(type="dadapt", name=name, options=options).build([Group("all", (ours,))]), 8)
    run(theirs, getattr(pytorch_optimizer, other)([theirs], lr=1.0, **options), 8)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_one_rate_for_all_groups() -> None:
    first, second, third = start(), start(), start()
    groups = [Group("dit", (first,)), Group("clip_l", (second,), lr=0.5), Group("t5xxl", (third,), lr=0.0)]
    with pytest.raises(ConfigError, match="one learning rate for everything") as error:
        Config(type="dadapt").build(groups)
    assert "dit 1, clip_l 0.5" in str(error.value)
    assert len(Config(type="dadapt").build([groups[0], groups[2]]).param_groups) == 1, "a rate of 0 leaves a group out"


@pytest.mark.parametrize("name", CLASSES)
def test_a_warm_up_may_begin_at_0(name: str) -> None:
    param = start()
    optimizer = Config(type="dadapt", name=name, options={"d0": 1e-3}).build([Group("all", (param,))])
    for step in range(6):
        optimizer.param_groups[0]["lr"] = step / 5
        run(param, optimizer, 1)
        assert step > 0 or torch.equal(param, start())
    assert bool(param.isfinite().all())
    assert not torch.equal(param, start())
