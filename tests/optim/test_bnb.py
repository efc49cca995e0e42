"""Optimizers of bitsandbytes: near the exact ones, moments in bytes, and SGD whose Nesterov momentum is one."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fluxsmith.optim.bnb import CLASSES, Config
from fluxsmith.optim.groups import Group


def run(param: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int = 20) -> torch.Tensor:
    for step in range(steps):
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return param.detach()


def start(size: int = 80) -> nn.Parameter:
    return nn.Parameter(torch.randn(size, 64, generator=torch.Generator().manual_seed(99)))


def built(param: nn.Parameter, name: str, **options: object) -> torch.optim.Optimizer:
    return Config(type="bnb", name=name, lr=1e-2, weight_decay=0.01, options=options).build([Group("all", (param,))])


@pytest.mark.parametrize("name", CLASSES)
def test_it_is_the_class_of_that_name(name: str) -> None:
    assert type(built(start(), name)).__name__ == CLASSES[name]


@pytest.mark.parametrize("name", ["adamw", "paged_adamw", "paged_adamw32bit"])
def test_32_bit_is_adamw(name: str) -> None:
    ours, theirs = start(), start()
    run(ours, built(ours, name, betas=(0.8, 0.95)))
    run(theirs, torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.01, betas=(0.8, 0.95)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.ledger("KS-09")
@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_8_bit_is_near_adamw(name: str) -> None:
    ours, theirs = start(), start()
    optimizer = built(ours, name)
    got = run(ours, optimizer)
    expected = run(theirs, torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.01))
    assert optimizer.state[ours]["state1"].dtype == torch.uint8
    assert float((got - expected).norm() / (expected - start().detach()).norm()) < 0.1


def test_small_tensors_keep_whole_moments() -> None:
    param = start(8)
    optimizer = built(param, "adamw8bit")
    run(param, optimizer, 1)
    assert optimizer.state[param]["state1"].dtype == torch.float32
    optimizer = built(param, "adamw8bit", min_8bit_size=256)
    run(param, optimizer, 1)
    assert optimizer.state[param]["state1"].dtype == torch.uint8


@pytest.mark.ledger("KS-09")
@pytest.mark.parametrize("is_nesterov", [False, True])
@pytest.mark.parametrize(("name", "allowed"), [("sgd", 1e-5), ("sgd8bit", 0.05)])
def test_nesterov_is_honoured(name: str, allowed: float, is_nesterov: bool) -> None:
    """bitsandbytes takes the flag and does not use it."""
    ours, theirs = start(), start()
    got = run(ours, built(ours, name, momentum=0.9, nesterov=is_nesterov), 5)
    expected = run(theirs, torch.optim.SGD([theirs], lr=1e-2, weight_decay=0.01, momentum=0.9, nesterov=is_nesterov), 5)
    other = start()
    without = run(other, torch.optim.SGD([other], lr=1e-2, weight_decay=0.01, momentum=0.9, nesterov=not is_nesterov), 5)
    way = (expected - start().detach()).norm()
    assert float((got - expected).norm() / way) < allowed
    assert float((without - expected).norm() / way) > 0.15


def test_sgd_without_momentum_does_not_exist() -> None:
    with pytest.raises(ValidationError, match="without momentum"):
        Config(type="bnb", name="sgd8bit", options={"momentum": 0.0})


def test_restored_state_is_put_into_pages_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card: tensors that came from a file are copied into paged buffers, small ones stay."""
    param = start(2000)
    optimizer = built(param, "paged_adamw")
    run(param, optimizer, 1)
    kept = optimizer.state[param]["state1"].clone()
    paged = []

    def buffer(self: object, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        paged.append(tensor.numel())
        return torch.zeros(tensor.shape, dtype=dtype)

    monkeypatch.setattr(type(optimizer), "get_state_buffer", buffer)
    monkeypatch.setattr("fluxsmith.optim.bnb.is_host", lambda tensor: False)
    optimizer.after_restore()  # type: ignore[attr-defined]  # of the paged classes
    assert paged == [128_000, 128_000]
    assert torch.equal(optimizer.state[param]["state1"], kept)
