"""Swapped blocks: the same bits forward and backward, no device memory for their weights, sd-scripts' division of the number."""

import pytest
import torch
from small_dit import dit, tokens
from torch import Tensor

from fluxsmith.adapters.base import linear_layers
from fluxsmith.config.choice import realise
from fluxsmith.config.load import load_config
from fluxsmith.errors import ConfigError
from fluxsmith.memory.block_swap import BlockSwap, swapped_blocks
from fluxsmith.memory.checkpoint import checkpoint_blocks
from fluxsmith.models.flux import FluxDiT

CPU = torch.device("cpu")


def gradients(model: FluxDiT) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and the gradients of a LoRA on every layer."""
    section = {"type": "lora", "rank": 2}
    plain = {"model": {"type": "flux1"}, "train": {"steps": 1}, "data": [{"type": "folder", "path": "x"}], "run": {"dir": "y"}}
    config = load_config({**plain, "adapter": section}).config
    adapters = realise(config.adapter).build({"dit": model}, seed=0)
    for param in adapters.params.values():
        torch.nn.init.normal_(param, std=0.1, generator=torch.Generator().manual_seed(3))
    if getattr(model, "swaps", False):
        BlockSwap(model, swapped_blocks(2, 3, 5), CPU).attach()
        checkpoint_blocks(model)
    output = model(tokens())
    output.square().mean().backward()
    return output.detach(), {name: param.grad.clone() for name, param in adapters.params.items() if param.grad is not None}


@pytest.mark.ledger("KS-22")
def test_forward_and_backward_are_the_same_bits() -> None:
    resident, swapped = dit(), dit()
    swapped.swaps = True  # type: ignore[assignment]  # a note for this test
    (one, grads), (other, their_grads) = gradients(resident), gradients(swapped)
    assert torch.equal(one, other)
    assert grads.keys() == their_grads.keys()
    assert len(grads) == 2 * len([path for path in linear_layers({"dit": resident}) if "_blocks." in path])
    assert all(torch.equal(grads[name], their_grads[name]) for name in grads)


@pytest.mark.ledger("KS-22")
def test_swapped_weights_have_no_memory_between_calls() -> None:
    model = dit()
    before = sum(param.numel() for param in model.parameters())
    swap = BlockSwap(model, swapped_blocks(2, 3, 5), CPU)
    swap.attach()
    model(tokens())
    resident = sum(param.numel() for param in model.parameters() if param.device.type != "meta")
    assert before - resident == swap.host_bytes // 4
    gone = {index for index, block in enumerate(model.blocks) if all(p.device.type == "meta" for p in block.parameters())}
    assert gone == {2, 6, 7}


@pytest.mark.ledger("KS-22")
def test_the_number_is_divided_as_sd_scripts_does() -> None:
    chosen = swapped_blocks(18, 19, 38)
    assert chosen == [*range(10, 19), *range(19 + 20, 19 + 38)]
    assert len(swapped_blocks(35, 19, 38)) == 17 + 36
    assert swapped_blocks(0, 19, 38) == []
    with pytest.raises(ConfigError, match="36 is too many") as caught:
        swapped_blocks(36, 19, 38)
    assert "use at most 35" in "\n".join(caught.value.lines())
