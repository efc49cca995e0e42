"""Autocast, the scaler of fp16 with its state, clipping under both, and what is forgiven."""

import pytest
import torch
from torch import nn

from fluxsmith.train.precision import Precision, peak_bytes, resolved

CPU = torch.device("cpu")


def layer() -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    linear = nn.Linear(4, 3)
    return linear, torch.optim.SGD(linear.parameters(), lr=0.1)


@pytest.mark.ledger("KS-13")
@pytest.mark.parametrize(("name", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_forward_pass_runs_in_the_type(name: str, dtype: torch.dtype) -> None:
    linear, _ = layer()
    with Precision(name, CPU).autocast():
        assert linear(torch.ones(2, 4)).dtype == dtype
    assert linear.weight.dtype == torch.float32


def test_auto_follows_the_device() -> None:
    assert resolved("auto", CPU) == "no"
    assert resolved("auto", torch.device("cuda")) == "bf16"
    assert resolved("fp16", CPU) == "fp16"


@pytest.mark.ledger("KS-13")
def test_scaled_gradients_are_unscaled_before_clipping_and_stepping() -> None:
    results = []
    for name in ("no", "fp16"):
        (linear, optimizer), precision = layer(), Precision(name, CPU)
        precision.backward(linear(torch.ones(2, 4)).square().mean())  # in fp32, so that both are the same numbers
        if precision.scaler is not None:
            assert linear.weight.grad.abs().max() > 1000, "it is scaled up to here"
        norm = precision.clip(optimizer, linear.parameters(), 0.5)
        precision.step(optimizer)
        results.append((norm, linear.weight.detach().clone(), linear.weight.grad.clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2])


@pytest.mark.ledger("ST-29")
def test_clipping() -> None:
    for max_norm in (0.0, 1e9, 0.25):
        (linear, optimizer), precision = layer(), Precision("no", CPU)
        (linear(torch.ones(2, 4)) * 10).square().mean().backward()
        before = torch.cat([param.grad.flatten() for param in linear.parameters()]).clone()
        norm = precision.clip(optimizer, linear.parameters(), max_norm)
        after = torch.cat([param.grad.flatten() for param in linear.parameters()])
        assert norm == pytest.approx(float(before.norm()))
        if max_norm == 0.25:
            assert float(after.norm()) == pytest.approx(0.25, rel=1e-4)
            torch.testing.assert_close(after / after.norm(), before / before.norm())
        else:
            assert torch.equal(after, before)


def overflow(precision: Precision, linear: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    precision.backward(linear(torch.ones(2, 4)).sum())
    linear.weight.grad[0, 0] = float("inf")
    precision.clip(optimizer, linear.parameters(), 1.0)


@pytest.mark.ledger("KS-13")
def test_an_overflow_lowers_the_scale_and_leaves_the_weights() -> None:
    (linear, optimizer), precision = layer(), Precision("fp16", CPU)
    before, scale = linear.weight.detach().clone(), precision.scaler.get_scale()
    overflow(precision, linear, optimizer)
    assert precision.forgives(1.0)
    precision.skip()
    assert torch.equal(linear.weight, before)
    assert precision.scaler.get_scale() == scale / 2


def test_what_is_forgiven() -> None:
    fp16 = Precision("fp16", CPU)
    assert not fp16.forgives(float("nan"))
    assert not fp16.forgives(float("inf"))
    assert not Precision("bf16", CPU).forgives(1.0)


def test_an_overflow_that_no_scale_mends_is_not_forgiven_for_ever() -> None:
    (linear, optimizer), precision = layer(), Precision("fp16", CPU)
    forgiven = 0
    while precision.forgives(1.0) and forgiven < 100:
        overflow(precision, linear, optimizer)
        precision.skip()
        forgiven += 1
    assert forgiven < 20


@pytest.mark.ledger("KS-13")
def test_the_scaler_comes_back() -> None:
    (linear, optimizer), precision = layer(), Precision("fp16", CPU)
    overflow(precision, linear, optimizer)
    precision.skip()
    state = precision.state()
    other = Precision("fp16", CPU)
    other.restore(state)
    assert other.state() == state
    assert other.scaler.get_scale() == precision.scaler.get_scale()
    assert Precision("no", CPU).state() is None
    Precision("no", CPU).restore(state)


def test_peak_on_the_cpu_is_that_of_the_host() -> None:
    assert 50e6 < peak_bytes(CPU) < 1e12


@pytest.mark.ledger("KS-13")
def test_gradients_that_are_fp16_themselves_are_scaled_too() -> None:
    """torch's own scaler refuses them; a gradient below fp16's smallest normal number moves the weight."""
    scaled = Precision("fp16", CPU)
    param = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
    optimizer = torch.optim.SGD([param], lr=1e4)
    scaled.backward((param.float() * 5e-7).sum())
    assert param.grad is not None
    assert param.grad.dtype == torch.float16
    assert scaled.clip(optimizer, [param], 0) == pytest.approx(1e-6, rel=0.3)
    scaled.step(optimizer)
    assert float(-param.detach()[0]) == pytest.approx(5e-3, rel=0.3)
