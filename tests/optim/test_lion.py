"""Lion: the numbers of lion-pytorch, and steps that bf16 weights do not lose."""

import lion_pytorch
import pytest
import torch
from torch import nn

from fluxsmith.errors import ConfigError
from fluxsmith.optim.groups import Group
from fluxsmith.optim.lion import Config


@pytest.mark.ledger("KS-09")
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_the_original(decay: float) -> None:
    start = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = Config(type="lion", lr=1e-2, weight_decay=decay, options={"betas": (0.95, 0.98)}).build([Group("all", (ours,))])
    reference = lion_pytorch.Lion([theirs], lr=1e-2, betas=(0.95, 0.98), weight_decay=decay)
    for step in range(20):
        ours.grad = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_small_steps_act_on_bf16_weights() -> None:
    torch.manual_seed(0)
    param = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = Config(type="lion", lr=1e-4).build([Group("all", (param,))])
    for _ in range(50):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert float(param.detach().float().mean()) == pytest.approx(1 - 50e-4, abs=5e-4)


def test_betas_out_of_range() -> None:
    with pytest.raises(ConfigError, match="betas"):
        Config(type="lion", options={"betas": (0.9, 1.0)}).build([Group("all", (nn.Parameter(torch.ones(2)),))])
