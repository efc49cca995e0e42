"""AdamW for 16-bit weights: torch's AdamW in fp32, the exact mean of roundings in bf16, and no lost steps."""

import math

import pytest
import torch
from torch import Tensor, nn

from fluxsmith.optim.adamw_bf16 import AdamWBF16, Config, copy_stochastic_
from fluxsmith.optim.groups import Group


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((8, 5), (5,), (2, 3, 4))]


def gradients(step: int, params: list[nn.Parameter]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(param.shape, generator=generator).to(param.dtype) for param in params]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fp32_equals_torch(weight_decay: float) -> None:
    ours, theirs = weights(), weights()
    optimizer = AdamWBF16(ours, 1e-2, (0.8, 0.95), eps=1e-6, weight_decay=weight_decay)
    reference = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay)
    for step in range(25):
        for params in (ours, theirs):
            for param, gradient in zip(params, gradients(step, params), strict=True):
                param.grad = gradient
        optimizer.step()
        reference.step()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-6)


def test_fp32_equals_the_formula_in_float64() -> None:
    (param, *_) = weights()
    first = param.detach().double()
    optimizer = AdamWBF16([param], 1e-2, (0.9, 0.99), eps=1e-8, weight_decay=0.05)
    weight, m, v = first.clone(), torch.zeros_like(first), torch.zeros_like(first)
    for step in range(1, 11):
        param.grad = gradients(step, [param])[0]
        optimizer.step()
        gradient = param.grad.double()
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        weight = weight * (1 - 1e-2 * 0.05) - 1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
    torch.testing.assert_close(param.detach().double(), weight, rtol=0, atol=1e-6)


def test_rounding_has_the_exact_mean() -> None:
    exact = torch.tensor([1.0 + 2**-10, -3.001, 1e-30, 0.1, 12345.678])
    draws, torch_draws = torch.empty(20_000, len(exact), dtype=torch.bfloat16), exact.expand(20_000, -1)
    torch.manual_seed(0)
    copy_stochastic_(draws, torch_draws)
    step = 2.0 ** (exact.abs().log2().floor() - 7)  # distance of neighbours in bf16
    error = (draws.double().mean(dim=0) - exact.double()).abs() / step
    assert error.max() < 4 * 0.5 / math.sqrt(20_000), error  # four standard deviations of the worst case
    assert ((draws.float() - exact).abs() < step).all()  # one of the two neighbours, never further
    assert all(len(draws[:, column].unique()) == 2 for column in range(4))


def test_rounding_keeps_what_bf16_can_hold() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-126, 3.3895313892515355e38])
    target = torch.empty(6, dtype=torch.bfloat16)
    for _ in range(20):
        copy_stochastic_(target, exact)
        assert torch.equal(target.float(), exact)
    whole = torch.empty(3)
    copy_stochastic_(whole, torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(whole, torch.tensor([0.1, 0.2, 0.3]))


def test_rounding_of_what_is_not_finite() -> None:
    target = torch.empty(3, dtype=torch.bfloat16)
    copy_stochastic_(target, torch.tensor([float("inf"), float("-inf"), float("nan")]))
    assert not target.isfinite().any(), "a value that is not finite must stay visible"


def drift(optimizer: torch.optim.Optimizer, param: nn.Parameter, steps: int) -> float:
    for _ in range(steps):
        param.grad = torch.full_like(param, 1e-3)
        optimizer.step()
    return float(param.detach().float().mean())


def test_steps_below_the_resolution_are_not_lost() -> None:
    """1 - 1e-4 is 1 in bf16: plain rounding stands still, stochastic rounding goes 1e-4 a step on average."""
    plain = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    assert drift(torch.optim.AdamW([plain], lr=1e-4, weight_decay=0), plain, 50) == 1.0
    param = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    torch.manual_seed(0)
    assert drift(AdamWBF16([param], 1e-4, weight_decay=0), param, 50) == pytest.approx(1 - 50 * 1e-4, abs=5e-4)


def test_state_is_in_the_type_of_the_weight_and_a_step_is_fixed_by_the_seed() -> None:
    results = []
    for _ in range(2):
        (param,) = weights(torch.bfloat16)[:1]
        optimizer = AdamWBF16([param], 1e-2)
        torch.manual_seed(3)
        param.grad = gradients(0, [param])[0]
        optimizer.step()
        assert optimizer.state[param]["exp_avg"].dtype == torch.bfloat16
        results.append(param.detach().clone())
    assert torch.equal(*results)


def test_config_builds_it_over_groups() -> None:
    one, two, three = weights()
    groups = [Group("slow", (one,), lr_factor=0.5), Group("fixed", (two,), lr=3e-4, weight_decay=0.0)]
    optimizer = Config(type="adamw_bf16", lr=1e-3).build(groups)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 3e-4]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert three not in optimizer.state
