"""Trained blocks that come and go: updated in the backward pass and copied back, over several steps, equal to resident ones."""

import pytest
import torch
from small_dit import dit, tokens
from torch import Tensor, nn

from fluxsmith.memory.block_swap import Streaming
from fluxsmith.memory.checkpoint import checkpoint_blocks
from fluxsmith.memory.slots import Copier, Slot
from fluxsmith.memory.trained_swap import TrainedSwap
from fluxsmith.models.flux import FluxDiT

CPU = torch.device("cpu")
EVERY = tuple(range(8))


class Late(Copier):
    """What is stored arrives on the host only when somebody waits, or when the next copy on the same stream begins; slots start as NaN."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.order: list[str] = []

    def slot(self, size: int, device: torch.device) -> Slot:
        made = super().slot(size, device)
        made.buffer.fill_(255)
        return made

    def store(self, slot: Slot, start: int, stop: int, target: Tensor) -> None:
        self.order.append("store")
        self.waiting.append((slot.buffer[start:stop].clone(), target))

    def copy(self, slot: Slot, source: Tensor) -> None:
        self.order.append("copy")
        self.settle()
        super().copy(slot, source)

    def settle(self) -> None:
        for value, target in self.waiting:
            target.copy_(value)
        self.waiting.clear()


def three_steps(model: FluxDiT, swap: TrainedSwap | None) -> list[Tensor]:
    """Outputs of three steps of which each changes every block tensor inside its backward pass."""
    if swap is not None:
        swap.attach()
    checkpoint_blocks(model)

    @torch.no_grad()
    def update(param: Tensor) -> None:
        if isinstance(param, nn.Parameter) and param.grad is not None:
            param.sub_(param.grad, alpha=0.05)
            param.grad = None
            if swap is not None:
                swap.wrote([param])

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(update)
    found = []
    for step in range(3):
        output = model(tokens()._replace(t=torch.tensor([0.2 + 0.3 * step])))
        output.square().mean().backward()
        found.append(output.detach())
        if swap is not None:
            swap.rest()
        with torch.no_grad():
            found.append(model(tokens()))  # a picture between steps
        if swap is not None:
            swap.rest()
    return found


@pytest.mark.ledger("KS-22")
@pytest.mark.parametrize(
    "how",
    [
        Streaming(EVERY),
        Streaming(EVERY, slots=3),
        Streaming(EVERY, slots=1, prefetch=False),
        Streaming(EVERY, per_unit=3),
        Streaming((1, 2, 6)),
    ],
)
def test_weights_and_outputs_are_the_same_bits(how: Streaming) -> None:
    one, other = dit().requires_grad_(True), dit().requires_grad_(True)
    expected = three_steps(one, None)
    swap = TrainedSwap(other, how, CPU, copier=Late())
    for given, right in zip(three_steps(other, swap), expected, strict=True):
        assert torch.equal(given, right)
    for (name, param), right in zip(other.named_parameters(), one.parameters(), strict=True):
        assert torch.equal(param, right), name


def test_at_rest_tensors_lie_in_masters_and_only_they_hold_memory() -> None:
    model = dit().requires_grad_(True)
    swap = TrainedSwap(model, Streaming(EVERY), CPU)
    sizes = [param.numel() * param.element_size() for param in swap.home]
    assert sum(sizes) <= swap.host_bytes < sum(sizes) + 256 * len(sizes)
    masters = {master.buffer.untyped_storage().data_ptr() for master in swap.lane.masters}
    assert {param.untyped_storage().data_ptr() for param in swap.home} == masters
    swap.bring(3)
    assert len({param.untyped_storage().data_ptr() for param in swap.home} - masters) == 1
    assert not any("mod" in name for name, param in model.named_parameters() if param in swap.home), "modulations stay"


def test_copying_back_a_unit_that_is_gone_is_an_error() -> None:
    model = dit().requires_grad_(True)
    swap = TrainedSwap(model, Streaming(EVERY), CPU)
    swap.bring(2)
    with pytest.raises(ValueError, match="in use"):
        swap.lane.store(0, next(key for unit, key in swap.home.values() if unit == 0))
