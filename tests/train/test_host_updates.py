"""Whole models on one card: updates on the host, and trained blocks that come and go; the same bits as with everything resident."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_run
import torch
from PIL import Image
from ran import Go, same
from torch import Tensor

from fluxsmith.config.load import load_config
from fluxsmith.config.schema import RunConfig
from fluxsmith.errors import ConfigError
from fluxsmith.events import Bus
from fluxsmith.io.durable import Disk
from fluxsmith.memory.masters import Host
from fluxsmith.memory.slots import Copier, Slot
from fluxsmith.memory.trained_swap import TrainedSwap
from fluxsmith.train.distributed import World
from fluxsmith.train.host_optimizer import HostCopies
from fluxsmith.train.setup import build
from fluxsmith.train.trainer import Trainer

PICTURES = {"sample": [{"prompt": "a red circle", "width": 32, "height": 32, "steps": 2}], "validation": {"every": 2, "share": 0.2}}
BASE = {**PICTURES, "train.max_grad_norm": 0.05, "memory.checkpointing": True}
FUSED = {**BASE, "train.accumulation": 1, "memory.fused_update": "block"}
SWAPPED = {"memory.stream_blocks": "all"}
HOST = {"memory.optimizer_offload": "states"}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "on the host": (BASE, HOST),
    "swapped, on the host": (BASE, {**HOST, **SWAPPED}),
    "swapped, block by block": (FUSED, SWAPPED),
    "swapped, tensor by tensor": ({**FUSED, "memory.fused_update": "tensor"}, {"memory.offload": {"streams": False}}),
    "stochastic, swapped": ({**FUSED, "train.weights_dtype": "bf16", "optim": {"type": "adamw_bf16", "lr": 1e-3}}, SWAPPED),
    "stochastic, on the host": ({**BASE, "train.weights_dtype": "bf16", "optim": {"type": "adamw_bf16", "lr": 1e-3}}, HOST),
    "schedule-free": ({**BASE, "optim": {"type": "schedulefree", "lr": 1e-3}, "train.ema": None}, {**HOST, **SWAPPED}),
}


@pytest.mark.ledger("KS-53")
@pytest.mark.ledger("KS-22")
@pytest.mark.parametrize("way", WAYS)
def test_a_run_ends_in_the_same_bits(go: Go, way: str) -> None:
    base, changes = WAYS[way]
    plain, other = go(base, "plain"), go({**base, **changes}, "other")
    assert other.error is None
    assert plain.losses == other.losses
    assert [row["grad_norm"] for row in plain.rows] == [row["grad_norm"] for row in other.rows]
    assert same(plain.weights, other.weights)
    assert same(plain.tensors(4, "optimizer"), other.tensors(4, "optimizer"))
    if "train.ema" not in base:
        assert same(plain.tensors(4, "ema"), other.tensors(4, "ema"))
    files = [(ran.folder / "weights" / "w.safetensors").read_bytes() for ran in (plain, other)]
    assert files[0][-10_000:] == files[1][-10_000:]
    pictures = [Image.open(ran.folder / "samples" / "step-000004_p00_s42.png").tobytes() for ran in (plain, other)]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("way", ["swapped, on the host", "swapped, block by block"])
def test_a_run_is_continued_in_another_way_to_the_same_bits(go: Go, way: str) -> None:
    base, changes = WAYS[way]
    base = {**base, "schedule.name": "constant"}
    straight = go(base, "straight")
    go({**base, "train.steps": 2}, "cut")
    cut = go({**base, **changes}, "cut", resume=True)
    assert cut.error is None
    assert straight.losses == cut.losses
    assert same(straight.weights, cut.weights)


@pytest.mark.ledger("KS-53")
def test_states_and_gradients_live_in_pinned_memory(run_config: Callable[..., RunConfig]) -> None:
    pinned: list[int] = []
    host = Host(pin=True, pinner=lambda tensor: (pinned.append(tensor.data_ptr()), tensor)[1])
    parts = build(run_config({"train.accumulation": 1}), World(torch.device("cpu")), Bus())
    copies = HostCopies(parts.trained.params, host)
    model = parts.trained.params
    assert {param.data_ptr() for param in copies.params.values()} <= set(pinned)
    assert not {param.data_ptr() for param in copies.params.values()} & {param.data_ptr() for param in model.values()}
    before = len(pinned)
    sum((param * 2).sum() for param in model.values()).backward()
    assert all(param.grad is None for param in model.values()), "the device holds no gradient"
    assert all(bool((param.grad == 2).all()) for param in copies.params.values() if param.grad is not None)
    assert len(pinned) - before == len(model)
    sum((param * 3).sum() for param in model.values()).backward()
    assert all(bool((param.grad == 5).all()) for param in copies.params.values() if param.grad is not None), "micro-batches add up"
    assert len(pinned) - before == len(model), "buffers are used again"


def test_masters_in_fp32_beside_a_model_in_bf16(go: Go, run_config: Callable[..., RunConfig]) -> None:
    """Steps too small for bf16 count; the state holds the masters, the model computes with their rounding."""
    small = {
        "train.weights_dtype": "bf16",
        "optim": {"type": "torch", "name": "sgd", "lr": 1e-6, "weight_decay": 0},
        "train.max_grad_norm": 0,
    }
    lost, kept = go(small, "lost"), go({**small, "memory.optimizer_offload": "masters", **SWAPPED, "memory.checkpointing": True}, "kept")
    assert kept.error is None
    before = tiny_run.random_dit().state_dict()
    name = "dit.single_blocks.0.linear2.weight"
    assert kept.weights[name].dtype == torch.float32
    assert torch.equal(lost.weights[name], before[name.removeprefix("dit.")].bfloat16()), "nothing arrives"
    moved = kept.weights[name] - before[name.removeprefix("dit.")].bfloat16().float()
    assert 0 < float(moved.abs().max()) < 1e-4
    parts = build(run_config({**small, "memory.optimizer_offload": "masters"}), World(torch.device("cpu")), Bus())
    assert {param.dtype for param in parts.models.part("dit").parameters()} == {torch.bfloat16}
    assert {param.dtype for param in parts.trained.params.values()} == {torch.float32}


class Watched(Copier):
    """Counts what is copied, either way."""

    def __init__(self) -> None:
        self.fetched = self.stored = 0

    def copy(self, slot: Slot, source: Tensor) -> None:
        self.fetched += source.numel()
        super().copy(slot, source)

    def store(self, slot: Slot, start: int, stop: int, target: Tensor) -> None:
        self.stored += stop - start
        super().store(slot, start, stop, target)


@pytest.mark.ledger("KS-22")
def test_each_block_comes_twice_and_goes_back_once_a_step(run_config: Callable[..., RunConfig]) -> None:
    parts = build(run_config({**FUSED, **SWAPPED, "train.dry_step": False}), World(torch.device("cpu")), Bus())
    trainer = Trainer(parts, Bus(), Disk())
    swap: TrainedSwap = parts.trained.placement.swap  # type: ignore[attr-defined]
    swap.lane.copier = watched = Watched()
    weights = sum(param.numel() * param.element_size() for param in swap.home)
    assert weights > 0.5 * sum(p.numel() * p.element_size() for block in parts.models.part("dit").blocks for p in block.parameters())  # type: ignore[union-attr]
    trainer._optimizer_step()
    assert watched.stored == weights
    assert weights <= watched.fetched < 2.1 * weights  # two units stay in their slots at the turn
    assert all(param.data_ptr() in range(v.data_ptr(), v.data_ptr() + v.numel()) for param in swap.home for v in [_master(swap, param)])


def _master(swap: TrainedSwap, param: torch.nn.Parameter) -> Tensor:
    return swap.lane.masters[swap.home[param][0]].buffer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": {"checkpointing": True, "swap_blocks": 2}}, "blocks that are trained and swapped need one more choice"),
        ({"memory": {"optimizer_offload": "states", "fused_update": "block"}}, "exclude each other"),
        ({"memory": {"optimizer_offload": "states"}, "adapter": {"type": "lora"}}, "an adapter is updated on the device"),
        ({"memory": {"optimizer_offload": "states"}, "train": {"steps": 1, "precision": "fp16"}}, "gradient scaler"),
        ({"memory": {"optimizer_offload": "states"}, "optim": {"type": "bnb", "name": "adamw8bit"}}, "bitsandbytes work on cards"),
        ({"distributed": {"cpu_offload": True}}, "no effect while nothing is sharded"),
        ({"distributed": {"shard": "full"}, "optim": {"type": "torch", "name": "adafactor"}}, "cannot update shares"),
        ({"distributed": {"shard": "full"}, "memory": {"compile": True}}, "memory.compile and distributed.shard exclude each other"),
        ({"distributed": {"shard": "full", "gather": "bf16"}, "train": {"steps": 1, "precision": "no"}}, "need products in bf16"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_run(changes: dict[str, Any], message: str) -> None:
    plain = {"model": {"type": "flux1"}, "train": {"steps": 1}, "data": [{"type": "folder", "path": "x"}], "run": {"dir": "y"}}
    with pytest.raises(ConfigError, match=message):
        load_config({**plain, **changes})
