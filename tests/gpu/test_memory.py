"""On a card: streamed blocks, look-ahead and parked streams give the bits of resident weights, and free the memory they promise."""

import pytest
import torch
from small_dit import dit, tokens
from torch import Tensor

from fluxsmith.memory.block_swap import BlockSwap, Streaming
from fluxsmith.memory.checkpoint import Mode, checkpoint_blocks
from fluxsmith.memory.masters import move_resident
from fluxsmith.memory.modulation import LookAhead
from fluxsmith.models.stream import Tokens

pytestmark = pytest.mark.gpu


def given(device: torch.device) -> Tokens:
    made = tokens()
    moved = {name: value.to(device) for name, value in made._asdict().items() if isinstance(value, Tensor)}
    return made._replace(**moved)


def run(mode: Mode, how: Streaming | None, *, ahead: bool) -> tuple[Tensor, Tensor]:
    device = torch.device("cuda", 0)
    model = dit()
    if ahead:
        LookAhead(model, device).attach()
    if how is not None:
        BlockSwap(model, how, device).attach()
    move_resident(model, device)
    checkpoint_blocks(model, [mode] * len(model.blocks))
    img = given(device).img.clone().requires_grad_()
    for _ in range(3):
        img.grad = None
        output = model(given(device)._replace(img=img))
        output.square().mean().backward()
    assert img.grad is not None
    return output.detach().cpu(), img.grad.cpu()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("mode", ["boundary", "offloaded"])
@pytest.mark.parametrize("slots", [0, 2, 3])
def test_the_same_bits_on_a_card(mode: Mode, slots: int, ahead: bool) -> None:
    one, grad = run("boundary", None, ahead=False)
    other, theirs = run(mode, Streaming(tuple(range(8)), slots=slots) if slots else None, ahead=ahead)
    assert torch.equal(one, other)
    assert torch.equal(grad, theirs)


def test_streaming_waits_for_nothing_on_the_host() -> None:
    device = torch.device("cuda", 0)
    model, img = dit(), given(device).img.clone().requires_grad_()
    BlockSwap(model, Streaming(tuple(range(8))), device).attach()
    move_resident(model, device)
    checkpoint_blocks(model, ["offloaded"] * 8)
    inputs = given(device)._replace(img=img)
    model(inputs).mean().backward()  # allocates slots and pinned buffers
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(inputs).mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
