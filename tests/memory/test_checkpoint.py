"""Recomputing blocks in backward: the same bits forward and backward, hooks and dropout included, and less kept in between."""

import pytest
import tiny_run
import torch
from streams import Noting, tokens
from torch import Tensor, nn

from fluxsmith.memory.checkpoint import checkpoint_blocks
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.linear import Linear


def gradients(model: FluxDiT) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens()).square().mean().backward()
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.ledger("KS-14")
def test_recomputing_gives_the_same_bits() -> None:
    plain, recomputed = tiny_run.random_dit(), tiny_run.random_dit()
    checkpoint_blocks(recomputed)
    calls: list[str] = []
    assert torch.equal(plain(tokens()), recomputed(tokens()))
    assert torch.equal(plain(tokens(), [Noting("a", calls)]), recomputed(tokens(), [Noting("a", calls)]))
    one, other = gradients(plain), gradients(recomputed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def kept_bytes(model: FluxDiT) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model(tokens(cells=32, text=32))
    del kept
    return sum(sizes.values())


@pytest.mark.ledger("KS-14")
def test_recomputing_keeps_less() -> None:
    plain, recomputed = tiny_run.random_dit(), tiny_run.random_dit()
    checkpoint_blocks(recomputed)
    assert kept_bytes(recomputed) < 0.5 * kept_bytes(plain)


class Dropping(nn.Module):
    """An adapter that draws random numbers."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + torch.nn.functional.dropout(y, 0.5)


@pytest.mark.ledger("KS-14")
def test_recomputing_draws_the_same_numbers_again() -> None:
    results = []
    for recompute in (False, True):
        dit = tiny_run.random_dit()
        for module in dit.modules():
            if isinstance(module, Linear):
                module.adapters["drop"] = Dropping()
        if recompute:
            checkpoint_blocks(dit)
        torch.manual_seed(4)
        results.append(gradients(dit))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
