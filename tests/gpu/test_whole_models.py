"""On a card: trained blocks that come and go give the bits of resident ones, and updates on the host work from pinned memory."""

import pytest
import torch
from small_dit import dit, tokens
from torch import Tensor, nn

from fluxsmith.memory.block_swap import Streaming
from fluxsmith.memory.checkpoint import checkpoint_blocks
from fluxsmith.memory.masters import Host, move_resident
from fluxsmith.memory.trained_swap import TrainedSwap
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.stream import Tokens
from fluxsmith.train.host_optimizer import HostCopies

pytestmark = pytest.mark.gpu


def given(device: torch.device) -> Tokens:
    made = tokens()
    moved = {name: value.to(device) for name, value in made._asdict().items() if isinstance(value, Tensor)}
    return made._replace(**moved)


def placed(how: Streaming | None) -> tuple[FluxDiT, TrainedSwap | None]:
    device, model = torch.device("cuda", 0), dit().requires_grad_(True)
    swap = TrainedSwap(model, how, device) if how is not None else None
    if swap is not None:
        swap.attach()
    move_resident(model, device, swap.home if swap is not None else ())
    checkpoint_blocks(model)
    return model, swap


def fused(how: Streaming | None) -> list[Tensor]:
    """Outputs of four steps that change every tensor inside the backward pass, and the weights of the end."""
    model, swap = placed(how)

    @torch.no_grad()
    def update(param: Tensor) -> None:
        if isinstance(param, nn.Parameter) and param.grad is not None:
            assert param.device.type == "cuda"
            param.sub_(param.grad, alpha=0.05)
            param.grad = None
            if swap is not None:
                swap.wrote([param])

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(update)
    found = []
    for _ in range(4):
        output = model(given(torch.device("cuda", 0)))
        output.square().mean().backward()
        found.append(output.detach().cpu())
        if swap is not None:
            swap.rest()
    return [*found, *(param.detach().cpu() for param in model.parameters())]


@pytest.mark.ledger("KS-22")
@pytest.mark.parametrize(
    "how", [Streaming(tuple(range(8)), slots=1, prefetch=False), Streaming(tuple(range(8))), Streaming((1, 2, 6), slots=3)]
)
def test_swapped_blocks_are_updated_to_the_same_bits(how: Streaming) -> None:
    for one, other in zip(fused(None), fused(how), strict=True):
        assert torch.equal(one, other)


@pytest.mark.ledger("KS-53")
@pytest.mark.parametrize("how", [None, Streaming(tuple(range(8)))])
@pytest.mark.parametrize("masters", [False, True])
def test_updates_on_the_host(how: Streaming | None, masters: bool) -> None:
    """Two micro-batches a step; the gradients are those that the device would have had, the weights come back."""
    (plain, _), (model, swap) = placed(None), placed(how)
    copies = HostCopies(dict(model.named_parameters()), Host(pin=True), masters=masters, swap=swap)
    optimizers = [torch.optim.SGD(plain.parameters(), lr=0.05), torch.optim.SGD(copies.params.values(), lr=0.05)]
    inputs = given(torch.device("cuda", 0))
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        copies.clear()
        for _ in range(2):
            plain(inputs).square().mean().backward()
            model(inputs).square().mean().backward()
        copies.collect()
        for name, param in plain.named_parameters():
            own = copies.params[name]
            assert own.is_pinned()
            assert own.grad is not None
            assert param.grad is not None
            torch.testing.assert_close(own.grad, param.grad.cpu(), rtol=1e-5, atol=1e-7)
        for optimizer in optimizers:
            optimizer.step()
        copies.publish()
    torch.testing.assert_close(model(inputs), plain(inputs), rtol=1e-4, atol=1e-5)
    assert all(param.grad is None for param in model.parameters())
