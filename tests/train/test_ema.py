"""The average of the weights against its formula, in fp32 whatever the weights are, and put in their place without a trace."""

import pytest
import torch
from torch import nn

from fluxsmith.train.ema import Ema


def weights(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(3, generator=generator).to(dtype)) for name in ("a", "b")}


@pytest.mark.ledger("ST-29")
def test_the_average_follows_the_formula() -> None:
    params = weights()
    ema = Ema(params, 0.9)
    expected = {name: param.detach().double() for name, param in params.items()}
    for step in range(40):
        with torch.no_grad():
            for param in params.values():
                param += 0.1
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = {name: decay * value + (1 - decay) * params[name].detach().double() for name, value in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(ema.shadow[name].double(), value, atol=1e-5, rtol=0)


def test_the_first_steps_follow_the_weights_closely() -> None:
    params = {"a": nn.Parameter(torch.zeros(1))}
    ema = Ema(params, 0.999)
    with torch.no_grad():
        params["a"].fill_(1)
    ema.update(0)
    torch.testing.assert_close(ema.shadow["a"], torch.tensor([0.9]))


def test_the_shadow_is_a_copy_in_fp32() -> None:
    params = weights(torch.bfloat16)
    ema = Ema(params, 0.9)
    assert all(shadow.dtype == torch.float32 for shadow in ema.shadow.values())
    fine = Ema(weights(), 0.9)
    with torch.no_grad():
        fine.params["a"].add_(1)
    assert not torch.equal(fine.shadow["a"], fine.params["a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_and_taken_back_bit_for_bit(dtype: torch.dtype) -> None:
    params = weights(dtype)
    ema = Ema(params, 0.5)
    with torch.no_grad():
        params["a"].mul_(1.7)
    ema.update(50)
    before = {name: param.detach().clone() for name, param in params.items()}
    with ema.applied():
        assert torch.equal(params["a"], ema.shadow["a"].to(dtype))
        assert not torch.equal(params["a"], before["a"])
    assert all(torch.equal(params[name], before[name]) for name in params)


def test_an_error_inside_gives_the_weights_back_too() -> None:
    params = weights()
    ema, before = Ema(params, 0.5), params["a"].detach().clone()
    ema.shadow["a"].zero_()

    def fail() -> None:
        with ema.applied():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(params["a"], before)
