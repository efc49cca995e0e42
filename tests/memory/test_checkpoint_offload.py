"""What each mode of checkpointing keeps for the backward pass, in bytes, and that gradients are the same bits in all of them."""

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small_dit import dit
from streams import tokens
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fluxsmith.config.choice import realise
from fluxsmith.config.load import load_config
from fluxsmith.config.memory import MemoryConfig
from fluxsmith.errors import ConfigError
from fluxsmith.memory.checkpoint import Mode, checkpoint_blocks, modes_of
from fluxsmith.memory.host_ring import HostRing, Parked
from fluxsmith.models.flux import FluxDiT

PLAIN = {"model": {"type": "flux1"}, "train": {"steps": 1}, "data": [{"type": "folder", "path": "x"}], "run": {"dir": "y"}}
BLOCKS = 8


def run(modes: Sequence[Mode] | None, *, kind: str = "lora") -> tuple[list[Tensor], int]:
    """Output and gradients of two steps, and the bytes that autograd keeps on the device between forward and backward."""
    model = dit()
    adapters = realise(load_config({**PLAIN, "adapter": {"type": kind, "rank": 2}}).config.adapter).build({"dit": model}, seed=0)
    for param in adapters.params.values():
        torch.nn.init.normal_(param, std=0.1, generator=torch.Generator().manual_seed(3))
    if modes is not None:
        checkpoint_blocks(model, modes)
    found: list[Tensor] = []
    kept = 0
    for _ in range(2):
        for param in adapters.params.values():
            param.grad = None
        kept, output = saved(model)
        output.square().mean().backward()
        found += [output.detach(), *(param.grad for param in adapters.params.values() if param.grad is not None)]
    return found, kept


def saved(model: FluxDiT) -> tuple[int, Tensor]:
    """Bytes kept, each storage once, parameters left out, what waits on the host too: every hook below this one parks elsewhere."""
    own = {param.untyped_storage()._cdata for param in model.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(tokens(cells=16, text=16, batch=1))
    return sum(sizes.values()), output


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


MIXED: list[Mode] = ["offloaded", "offloaded", "boundary", "boundary", "selective", "selective", "keep", "keep"]


@pytest.mark.ledger("KS-14")
@pytest.mark.ledger("KS-23")
@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
@pytest.mark.parametrize("modes", [[mode] * BLOCKS for mode in ("keep", "selective", "boundary", "offloaded")] + [MIXED])
def test_gradients_are_the_same_bits(modes: list[Mode], kind: str) -> None:
    assert same(run(None, kind=kind)[0], run(modes, kind=kind)[0])


@pytest.mark.ledger("ST-07")
def test_each_mode_keeps_less_than_the_one_before() -> None:
    keep, selective, boundary, offloaded = (run([mode] * BLOCKS)[1] for mode in ("keep", "selective", "boundary", "offloaded"))
    assert boundary < 0.25 * keep
    assert offloaded < 0.6 * boundary
    assert selective <= boundary  # what it caches is kept outside of autograd, see below


class Alive(TorchDispatchMode):
    """Every storage that is made while it is on, for as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.made[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return result

    def bytes(self, without: set[StorageWeakRef]) -> int:
        gc.collect()
        return sum(size for ref, size in self.made.items() if not ref.expired() and ref not in without)


def alive(mode: Mode) -> int:
    """Bytes that live between forward and backward, whoever keeps them."""
    model = dit()
    config = load_config({**PLAIN, "adapter": {"type": "lora", "rank": 2}}).config
    realise(config.adapter).build({"dit": model}, seed=0)
    checkpoint_blocks(model, [mode] * BLOCKS)
    given = tokens(cells=16, text=16, batch=1)
    with Alive() as counted:
        output = model(given)
    found = counted.bytes({StorageWeakRef(param.untyped_storage()) for param in model.parameters()})
    del output
    return found


@pytest.mark.ledger("ST-07")
def test_selective_lies_between() -> None:
    keep, selective, boundary = alive("keep"), alive("selective"), alive("boundary")
    assert boundary < 0.4 * selective
    assert selective < 0.75 * keep


@pytest.mark.ledger("KS-23")
def test_parked_streams_leave_and_come_back_once() -> None:
    ring = HostRing()
    img, txt, other = torch.randn(1, 4, 8), torch.randn(1, 2, 8), torch.randn(3)
    keep = ring.keeper(img, txt)
    assert keep(other) is other
    parked = [keep(img.view(1, 4, 8)), keep(txt)]
    assert all(isinstance(one, Parked) for one in parked)
    assert [torch.equal(ring.fetch(one), tensor) for one, tensor in zip(parked, (img, txt), strict=True)] == [True, True]
    assert (ring.sent, ring.fetched, ring.buffers) == (2, 2, 2)
    parked.clear()
    keep(img)
    assert ring.buffers == 2, "a buffer is used again"


def test_a_graph_that_is_dropped_gives_its_buffers_back() -> None:
    ring = HostRing()
    for _ in range(3):
        ring.park(torch.randn(5))
    assert ring.buffers == 1


def modes(**options: object) -> list[Mode]:
    return modes_of(MemoryConfig.model_validate({"checkpointing": True, **options}), 3, 5)


@pytest.mark.ledger("ST-07")
def test_options_become_modes() -> None:
    assert modes(checkpointing=False) == ["keep"] * 8
    assert modes() == ["boundary"] * 8
    assert modes(checkpointing_offload=True) == ["offloaded"] * 8
    assert modes(checkpointing_interval=2) == ["boundary", "keep", "boundary"] + ["boundary", "keep", "boundary", "keep", "boundary"]
    assert modes(checkpointing_interval=2, checkpointing_offload=True)[:2] == ["offloaded", "keep"]
    assert modes(checkpointing_plan={"keep": 2, "selective": 1, "offloaded": 3}) == [
        *["offloaded"] * 3, *["boundary"] * 2, "selective", "keep", "keep",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="more blocks than the model"):
        modes(checkpointing_plan={"keep": 9})


@pytest.mark.ledger("ST-07")
def test_an_interval_keeps_more_and_gives_the_same_bits() -> None:
    every, second, third = (run(modes(checkpointing_interval=n)) for n in (1, 2, 3))
    assert every[1] < second[1] < third[1]
    assert same(every[0], second[0])
    assert same(every[0], third[0])
