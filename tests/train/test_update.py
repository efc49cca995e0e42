"""Updates inside the backward pass: the same weights as after it, with at most one tensor's (or block's) gradients alive."""

from collections.abc import Callable

import pytest
import tiny_run
import torch
from ran import Go, same

from fluxsmith.config.load import load_config
from fluxsmith.config.schema import RunConfig, as_plain
from fluxsmith.errors import ConfigError
from fluxsmith.events import Bus
from fluxsmith.io.durable import Disk
from fluxsmith.train.distributed import World
from fluxsmith.train.setup import build
from fluxsmith.train.trainer import Trainer
from fluxsmith.train.update import FusedUpdate, units_of

FREE = {"train.accumulation": 1, "train.max_grad_norm": 0}


@pytest.mark.ledger("KS-53")
@pytest.mark.parametrize("optim", [{"type": "torch", "name": "adamw"}, {"type": "adamw_bf16"}, {"type": "torch", "name": "sgd"}])
@pytest.mark.parametrize("fused", ["tensor", "block"])
def test_the_weights_are_those_of_the_plain_way(go: Go, fused: str, optim: dict[str, str]) -> None:
    changes = {**FREE, "optim": {**optim, "lr": 1e-3}}
    plain, inside = go(changes, "plain"), go({**changes, "memory.fused_update": fused}, "fused")
    assert inside.error is None
    assert same(plain.weights, inside.weights)
    assert [row["loss_hex"] for row in plain.rows] == [row["loss_hex"] for row in inside.rows]
    assert inside.rows[0]["grad_norm"] == pytest.approx(plain.rows[0]["grad_norm"], rel=1e-5)


@pytest.mark.ledger("KS-53")
@pytest.mark.parametrize(("fused", "most"), [("tensor", 1), ("block", 30)])
def test_few_gradients_live_at_a_time(run_config: Callable[..., RunConfig], fused: str, most: int) -> None:
    config = run_config({**FREE, "memory.fused_update": fused})
    parts = build(config, World(torch.device("cpu")), Bus())
    trainer = Trainer(parts, Bus(), Disk())
    alive: list[int] = []
    for param in parts.trained.params.values():
        param.register_post_accumulate_grad_hook(lambda _: alive.append(sum(p.grad is not None for p in parts.trained.params.values())))
    trainer._optimizer_step()
    assert len(alive) == 52  # every tensor of the tiny transformer
    assert max(alive) <= most  # the plain way ends with all of them
    assert all(param.grad is None for param in parts.trained.params.values())


def test_each_tensor_is_clipped_by_its_own_norm(go: Go) -> None:
    changes = {
        "train.accumulation": 1,
        "train.max_grad_norm": 1e-3,
        "optim": {"type": "torch", "name": "sgd", "lr": 1.0, "weight_decay": 0},
    }
    ran = go({**changes, "memory.fused_update": "tensor", "train.steps": 1})
    before = tiny_run.random_dit().state_dict()
    moves = [float((value - before[name.removeprefix("dit.")]).norm()) for name, value in ran.weights.items()]
    assert max(moves) == pytest.approx(1e-3, rel=1e-2)
    assert sum(move > 0.9e-3 for move in moves) > 10  # a global norm would leave one thousandth for all together


def test_a_resumed_run_is_exact(go: Go) -> None:
    changes = {**FREE, "memory.fused_update": "block", "checkpoint.every": 2, "schedule.name": "constant"}
    straight = go(changes, "straight")
    go({**changes, "train.steps": 2}, "cut")
    again = go(changes, "cut", resume=True)
    assert again.error is None
    assert same(straight.weights, again.weights)


def test_blocks_are_units(run_config: Callable[..., RunConfig]) -> None:
    config = run_config({"memory.fused_update": "block", "train.accumulation": 1})
    params = {f"dit.{name}": param for name, param in tiny_run.random_dit().named_parameters()}
    units = units_of(params, config)
    sizes = sorted(len(unit) for unit in units)
    assert sum(sizes) == len(params)
    assert sizes[-2:] == [6, 20]  # the single and the double block; all others, their modulations too, are on their own
    assert sizes[-3] == 1


@pytest.mark.parametrize(
    ("change", "word"), [({"train.accumulation": 2}, "accumulation"), ({"train.precision": "fp16"}, "scaler")], ids=["accumulation", "fp16"]
)
def test_what_it_cannot_do_is_refused(run_config: Callable[..., RunConfig], change: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        run_config({"train.accumulation": 1, "memory.fused_update": "tensor", **change})


def test_an_optimizer_that_looks_at_all_tensors_is_refused(run_config: Callable[..., RunConfig]) -> None:
    plain = as_plain(run_config({"train.accumulation": 1, "memory.fused_update": "tensor"}))
    plain["optim"] = {"type": "prodigy", "lr": 1.0}
    with pytest.raises(ConfigError, match="as a whole"):
        Trainer(build(load_config(plain).config, World(torch.device("cpu")), Bus()), Bus(), Disk())


def test_a_loss_that_is_not_finite_touches_nothing(go: Go) -> None:
    ran = go({**FREE, "memory.fused_update": "tensor", "checkpoint.every": 1, "optim.lr": 1e-3, "noise.min_sigma": 0.0, "train.steps": 2})
    assert ran.error is None
    assert FusedUpdate.is_fused
