"""Live bytes: storages are counted once, until they go; views and what was there before are not."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fluxsmith.memory.live import LiveBytes


def test_storages_are_counted_once_and_let_go() -> None:
    before = torch.ones(1000)
    with LiveBytes() as live:
        a = before + 1
        view = a[:10].view(2, 5)
        assert live.now["cpu"] == 4000
        b = torch.cat((a, a))
        assert live.peak["cpu"] == live.now["cpu"] == 12_000
        del b
        assert live.now["cpu"] == 4000
        del a
        assert live.now["cpu"] == 4000, "the view holds it"
        del view
        assert live.now["cpu"] == 0
        assert live.mark()["cpu"] == 12_000
        assert live.peak["cpu"] == 0


def test_what_autograd_keeps_lives_until_the_backward_pass() -> None:
    weight = torch.ones(100, 100, requires_grad=True)
    with LiveBytes() as live:
        loss = (torch.ones(7, 100) @ weight).square().sum()
        held = live.now["cpu"]
        loss.backward()
        assert held == 4 * (700 + 700 + 1)
        assert live.now["cpu"] == 4 * (1 + 10_000), "loss and gradient"


def test_tensors_without_memory_are_counted_alike() -> None:
    with FakeTensorMode(), LiveBytes() as live:
        x = torch.empty(1 << 20, 1 << 10)
        y = x + 1
        assert live.peak["cpu"] == 2 * (1 << 32)
        del x, y
        assert live.now["cpu"] == 0
