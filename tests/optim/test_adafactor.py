"""Adafactor: the numbers of transformers' class for every option, its own rate, and stochastic rounding."""

from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from torch import nn

from fluxsmith.optim.adafactor import Config
from fluxsmith.optim.groups import Group

RECIPE = {"relative_step": False, "scale_parameter": False, "warmup_init": False}


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((8, 5), (5,), (2, 3, 4))]


def run(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int = 12) -> list[nn.Parameter]:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
    return params


@pytest.mark.ledger("KS-09")
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "options",
    [
        RECIPE,
        {"scale_parameter": True},
        {"relative_step": True},
        {"relative_step": True, "scale_parameter": True},
        {"relative_step": True, "scale_parameter": True, "warmup_init": True},
        {"beta1": 0.9, "clip_threshold": 0.3},
        {"decay_rate": -0.5, "eps": (1e-20, 1e-2), "scale_parameter": True},
    ],
    ids=str,
)
def test_equals_transformers(options: dict[str, Any], decay: float) -> None:
    ours, theirs = weights(), weights()
    optimizer = Config(type="adafactor", lr=1e-2, weight_decay=decay, options=options).build([Group("all", tuple(ours))])
    lr = None if options.get("relative_step") else 1e-2
    reference = transformers.Adafactor(theirs, lr=lr, weight_decay=decay, **{**RECIPE, **options})
    run(ours, optimizer)
    run(theirs, reference)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_its_own_rate_is_told() -> None:
    """sd-scripts logs the rate of the first tensor."""
    params = weights()
    optimizer = Config(type="adafactor", options={"relative_step": True, "warmup_init": True}).build([Group("all", tuple(params))])
    assert optimizer.param_groups[0]["lr"] is None
    run(params, optimizer, 5)
    assert optimizer.param_groups[0]["rate"] == pytest.approx(5e-6)


def test_its_own_rate_uses_no_schedule() -> None:
    assert Config(type="adafactor").uses_schedule()
    assert not Config(type="adafactor", options={"relative_step": True}).uses_schedule()
    with pytest.raises(ValidationError, match="warmup_init belongs to relative_step"):
        Config(type="adafactor", options={"warmup_init": True})


def test_small_steps_act_on_bf16_weights() -> None:
    """transformers' class rounds to nearest: a weight of 1 stays 1 under steps of 1e-4."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = Config(type="adafactor", lr=1e-4).build([Group("all", (ours,))])
    reference = transformers.Adafactor([theirs], lr=1e-4, **RECIPE)
    for _ in range(50):
        ours.grad = theirs.grad = torch.full_like(ours, 1e-3)
        optimizer.step()
        reference.step()
    assert float(theirs.detach().float().mean()) == 1.0
    assert float(ours.detach().float().mean()) == pytest.approx(1 - 50e-4, abs=5e-4)


def test_state_of_a_matrix_is_two_vectors() -> None:
    (param, *_) = weights()
    optimizer = Config(type="adafactor", lr=1e-2).build([Group("all", (param,))])
    run([param], optimizer, 1)
    assert {key: tuple(value.shape) for key, value in optimizer.state[param].items() if key != "step"} == {
        "exp_avg_sq_row": (8,),
        "exp_avg_sq_col": (5,),
    }
