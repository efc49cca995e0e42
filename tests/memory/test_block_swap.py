"""Streamed blocks: the same bits forward and backward, no device memory for their weights, every way to say how many."""

from pathlib import Path

import pytest
import torch
from small_dit import dit, tokens
from torch import Tensor

from fluxsmith.adapters.base import linear_layers
from fluxsmith.config.choice import realise
from fluxsmith.config.load import load_config
from fluxsmith.config.memory import MemoryConfig
from fluxsmith.errors import ConfigError
from fluxsmith.memory.block_swap import BlockSwap, Streaming, checked, evenly, streaming, swapped_blocks
from fluxsmith.memory.checkpoint import checkpoint_blocks
from fluxsmith.memory.masters import Host
from fluxsmith.memory.modulation import LookAhead
from fluxsmith.memory.slots import Copier, Slot
from fluxsmith.models.flux import FluxDiT
from fluxsmith.quant.base import quantise

CPU = torch.device("cpu")
PLAIN = {"model": {"type": "flux1"}, "train": {"steps": 1}, "data": [{"type": "folder", "path": "x"}], "run": {"dir": "y"}}


class Counting(Copier):
    """Counts copies to the device; there is no other direction."""

    def __init__(self) -> None:
        self.copies = 0

    def copy(self, slot: Slot, source: Tensor) -> None:
        self.copies += 1
        super().copy(slot, source)


def three_steps(
    model: FluxDiT, how: Streaming | None, *, kind: str = "lora", host: Host | None = None, ahead: bool = False
) -> list[Tensor]:
    """Outputs, gradients and weights of three steps of a trained adapter on every block layer."""
    adapters = realise(load_config({**PLAIN, "adapter": {"type": kind, "rank": 2}}).config.adapter).build({"dit": model}, seed=0)
    for param in adapters.params.values():
        torch.nn.init.normal_(param, std=0.1, generator=torch.Generator().manual_seed(3))
    if ahead:
        LookAhead(model, CPU).attach()
    if how is not None:
        BlockSwap(model, how, CPU, host=host).attach()
    checkpoint_blocks(model)
    optimizer = torch.optim.SGD(adapters.params.values(), lr=0.1)
    found: list[Tensor] = []
    for step in range(3):
        optimizer.zero_grad()
        output = model(tokens()._replace(t=torch.tensor([0.2 + 0.3 * step])))
        output.square().mean().backward()
        grads = [param.grad for param in adapters.params.values() if param.grad is not None]
        assert len(grads) == len(adapters.params)
        found += [output.detach(), *(grad.clone() for grad in grads)]
        optimizer.step()
    return found + [param.detach() for param in adapters.params.values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


WAYS = {
    "sd-scripts": Streaming((2, 6, 7)),
    "all": Streaming(tuple(range(8))),
    "some": Streaming((1, 4, 6)),
    "three slots": Streaming(tuple(range(8)), slots=3),
    "groups": Streaming(tuple(range(8)), per_unit=3),
    "one group": Streaming(tuple(range(8)), per_unit=8),
    "no prefetch": Streaming(tuple(range(8)), slots=1, prefetch=False),
}


@pytest.mark.ledger("KS-22")
@pytest.mark.ledger("ST-08")
@pytest.mark.parametrize("way", WAYS)
def test_three_steps_are_the_same_bits(way: str) -> None:
    assert same(three_steps(dit(), None), three_steps(dit(), WAYS[way]))


@pytest.mark.parametrize("kind", ["dora", "oft", "lokr"])
def test_adapters_that_read_the_weight_see_the_visiting_one(kind: str) -> None:
    assert same(three_steps(dit(), None, kind=kind), three_steps(dit(), WAYS["all"], kind=kind))


def test_with_look_ahead_beside_it() -> None:
    assert same(three_steps(dit(), None), three_steps(dit(), WAYS["all"], ahead=True))


@pytest.mark.ledger("ST-08")
def test_weights_on_disk(tmp_path: Path) -> None:
    assert same(three_steps(dit(), None), three_steps(dit(), WAYS["all"], host=Host(disk=tmp_path)))


def quantised(kind: str) -> FluxDiT:
    model = dit()
    quantise(realise(load_config({**PLAIN, "adapter": {"type": "lora"}, "quant": {"type": kind}}).config.quant), "dit", model)
    return model


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_quantised_layers_travel_with_their_scales(kind: str) -> None:
    model = quantised(kind)
    plain = sum(p.numel() for p in model.parameters()) * 4
    frozen = sum(t.numel() * t.element_size() for block in model.blocks for t in [*block.parameters(), *block.buffers()])
    swap = BlockSwap(model, WAYS["all"], CPU)
    assert frozen <= swap.host_bytes < 1.4 * frozen < plain
    assert same(three_steps(quantised(kind), None), three_steps(quantised(kind), WAYS["all"]))


@pytest.mark.ledger("KS-22")
def test_streamed_weights_have_no_memory_between_calls() -> None:
    model = dit()
    before = sum(param.numel() for param in model.parameters())
    swap = BlockSwap(model, Streaming((2, 6, 7)), CPU)
    swap.attach()
    model(tokens())
    resident = sum(param.numel() for param in model.parameters() if param.device.type != "meta")
    assert before - resident == sum(e.stop - e.start for m in [*swap.lane.masters, *swap.mod_lane.masters] for e in m.entries.values()) // 4
    gone = {index for index, block in enumerate(model.blocks) if all(p.device.type == "meta" for p in block.parameters())}
    assert gone == {2, 6, 7}
    assert swap.lane.device_bytes == 2 * max(master.size for master in swap.lane.masters)


@pytest.mark.ledger("DS-08")
def test_every_sampling_step_streams_and_nothing_comes_back() -> None:
    model, copier = dit(), Counting()
    plain = dit()
    swap = BlockSwap(model, WAYS["all"], CPU, copier=copier)
    swap.attach()
    masters = [master.buffer.clone() for master in swap.lane.masters]
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(plain(tokens()), model(tokens()))
    blocks, mods = 3 * 8 + 1, 3 * 8 + 1  # each once a step, and the first one of a fourth step is on its way
    assert copier.copies == blocks + mods
    assert all(torch.equal(before, master.buffer) for before, master in zip(masters, swap.lane.masters, strict=True))


@pytest.mark.ledger("KS-22")
def test_a_pass_without_gradients_between_two_with() -> None:
    """What keeping the base's own prediction does, and sampling while training."""
    results = []
    for how in (None, WAYS["all"]):
        model = dit().requires_grad_(False)
        if how is not None:
            BlockSwap(model, how, CPU).attach()
        checkpoint_blocks(model)
        img = tokens().img.clone().requires_grad_()
        with torch.no_grad():
            kept = model(tokens())
        output = model(tokens()._replace(img=img))
        with torch.no_grad():
            model(tokens())
        (output - 0.5 * kept).square().mean().backward()
        results.append(img.grad)
    assert torch.equal(*results)


def test_a_block_that_is_not_recomputed_fails_loudly() -> None:
    model, img = dit(), tokens().img.clone().requires_grad_()
    BlockSwap(model, WAYS["all"], CPU).attach()
    output = model(tokens()._replace(img=img))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.mean().backward()
    with pytest.raises(ConfigError, match="must be recomputed") as caught:
        checked(WAYS["some"], [True, True, True, True, False, True, False, True])
    assert "blocks 4, 6 are streamed" in "\n".join(caught.value.lines())


@pytest.mark.ledger("KS-22")
def test_the_number_is_divided_as_sd_scripts_does() -> None:
    chosen = swapped_blocks(18, 19, 38)
    assert chosen == [*range(10, 19), *range(19 + 20, 19 + 38)]
    assert len(swapped_blocks(35, 19, 38)) == 17 + 36
    assert swapped_blocks(0, 19, 38) == []
    with pytest.raises(ConfigError, match="36 is too many") as caught:
        swapped_blocks(36, 19, 38)
    assert "use at most 35" in "\n".join(caught.value.lines())


def test_streamed_blocks_are_evenly_spaced() -> None:
    assert evenly(57, 57) == [*range(57)]
    assert evenly(4, 57) == [7, 21, 35, 49]
    gaps = [b - a for a, b in zip(evenly(10, 57), evenly(10, 57)[1:], strict=False)]
    assert max(gaps) - min(gaps) <= 1
    with pytest.raises(ConfigError, match="58 is too many"):
        evenly(58, 57)


@pytest.mark.ledger("ST-08")
def test_every_option_becomes_a_plan() -> None:
    def plan(**options: object) -> Streaming:
        return streaming(MemoryConfig.model_validate({"checkpointing": True, **options}), 19, 38)

    assert plan() == Streaming()
    assert plan(stream_blocks="all") == Streaming(tuple(range(57)))
    assert plan(stream_blocks=4).indices == (7, 21, 35, 49)
    assert plan(swap_blocks=2).indices == (18, 55, 56)
    assert plan(offload={"blocks_per_group": 4}) == Streaming(tuple(range(57)), 4, 2, prefetch=True)
    assert plan(offload={"level": "leaf", "blocks_per_group": 4}).per_unit == 1
    assert plan(offload={"streams": False}) == Streaming(tuple(range(57)), 1, 1, prefetch=False)


def test_layers_are_still_found() -> None:
    model = dit()
    before = [*linear_layers({"dit": model})]
    BlockSwap(model, WAYS["all"], CPU)
    assert [*linear_layers({"dit": model})] == before
