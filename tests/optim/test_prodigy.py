"""Prodigy: the numbers of prodigyopt for every option, factors of groups, and the names people write."""

from typing import Any

import prodigyopt
import pytest
import torch
from torch import nn

from fluxsmith.errors import ConfigError
from fluxsmith.optim.groups import Group
from fluxsmith.optim.prodigy import Config, Prodigy


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((8, 5), (5,), (2, 3, 4))]


def run(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int = 40, lr: float | None = None) -> list[nn.Parameter]:
    """Gradients of a bowl with some noise, so that the estimate grows."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            if lr is not None:
                group["lr"] = lr * (step + 1) / steps
        for param in params:
            param.grad = param.detach() - 3 + 0.1 * torch.randn(param.shape, generator=generator)
        optimizer.step()
    return params


@pytest.mark.ledger("KS-09")
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"slice_p": 3},
        {"use_bias_correction": True, "safeguard_warmup": True},
        {"decouple": False, "betas": (0.8, 0.95), "beta3": 0.9},
        {"d_coef": 2.0, "d0": 1e-4, "growth_rate": 1.05},
        {"betas": (0.0, 0.99), "eps": 1e-6},
    ],
    ids=str,
)
def test_equals_the_original(options: dict[str, Any], decay: float) -> None:
    ours, theirs = weights(), weights()
    optimizer = Config(type="prodigy", weight_decay=decay, options=options).build([Group("all", tuple(ours))])
    reference = prodigyopt.Prodigy(theirs, lr=1.0, weight_decay=decay, **options)
    run(ours, optimizer)
    run(theirs, reference)
    assert optimizer.param_groups[0]["d"] == pytest.approx(reference.param_groups[0]["d"], rel=1e-4)
    assert optimizer.param_groups[0]["d"] > options.get("d0", 1e-6)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_equals_the_original_under_a_schedule() -> None:
    ours, theirs = weights(), weights()
    run(ours, Config(type="prodigy").build([Group("all", tuple(ours))]), lr=1.0)
    run(theirs, prodigyopt.Prodigy(theirs), lr=1.0)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_factors_of_groups_scale_their_steps() -> None:
    """prodigyopt stops with an error here. A factor acts as if the weights were measured in other units."""
    start = torch.randn(6, generator=torch.Generator().manual_seed(1))
    plain = nn.Parameter(start.clone())
    optimizer = Config(type="prodigy", lr=1.0, options={"d0": 1e-3}).build([Group("a", (plain,))])
    first, second = nn.Parameter(start.clone()), nn.Parameter(start.clone() / 2)
    pair = Config(type="prodigy", lr=1.0, options={"d0": 1e-3}).build([Group("a", (first,)), Group("b", (second,), lr_factor=0.5)])
    for step in range(15):
        gradient = torch.randn(6, generator=torch.Generator().manual_seed(step)) + 1
        plain.grad, first.grad, second.grad = gradient.clone(), gradient.clone(), gradient.clone() * 2
        optimizer.step()
        pair.step()
    assert pair.param_groups[0]["d"] == pytest.approx(optimizer.param_groups[0]["d"], rel=1e-5)
    torch.testing.assert_close(first, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(second * 2, plain, rtol=1e-5, atol=1e-6)


def test_names_that_people_write() -> None:
    options = {"weight_decouple": False, "bias_correction": True}
    built = Config(type="prodigy", options=options).build([Group("all", tuple(weights()))])
    assert (built.param_groups[0]["decouple"], built.param_groups[0]["use_bias_correction"]) == (False, True)


def test_slices_save_memory() -> None:
    param = nn.Parameter(torch.randn(100, generator=torch.Generator().manual_seed(0)))
    optimizer = Config(type="prodigy", options={"slice_p": 11}).build([Group("all", (param,))])
    run([param], optimizer, 1)
    assert (optimizer.state[param]["p0"].numel(), optimizer.state[param]["s"].numel()) == (10, 10)


def test_a_rate_of_0_changes_nothing_and_counts_no_step() -> None:
    params, start = weights(), weights()
    optimizer = Prodigy(params, lr=0.0)
    run(params, optimizer, 2)
    assert optimizer.param_groups[0]["k"] == 0
    assert all(torch.equal(one, other) for one, other in zip(params, start, strict=True))


def test_values_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="slice_p"):
        Config(type="prodigy", options={"slice_p": 0}).build([Group("all", tuple(weights()))])
