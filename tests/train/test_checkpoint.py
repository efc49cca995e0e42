"""States: every optimizer goes on as if nothing had happened, a foreign or damaged state is refused, and only old ones are pruned."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fluxsmith.errors import ModelFileError, StorageError
from fluxsmith.io.durable import Disk
from fluxsmith.optim import adamw_bf16, muon
from fluxsmith.optim import torch as torch_optimizers
from fluxsmith.optim.groups import Group
from fluxsmith.train.checkpoint import State, StateFolder, join_optimizer, read_state, restore, split_optimizer
from fluxsmith.train.ema import Ema

Build = Callable[[list[Group]], torch.optim.Optimizer]
BUILDERS: dict[str, Build] = {
    **{name: torch_optimizers.Config(type="torch", name=name, lr=1e-2).build for name in torch_optimizers.CLASSES},
    "sgd with momentum": torch_optimizers.Config(type="torch", name="sgd", lr=1e-2, options={"momentum": 0.9}).build,
    "adamw amsgrad": torch_optimizers.Config(type="torch", name="adamw", lr=1e-2, options={"amsgrad": True}).build,
    "adamw_bf16": adamw_bf16.Config(type="adamw_bf16", lr=1e-2).build,
    "muon": muon.Config(type="muon", lr=1e-2).build,
}


class Toy:
    """A few weights that are trained on fixed gradients."""

    def __init__(self, build: Build, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}
        self.optimizer = build([Group("all", tuple(self.params.values()))])
        self.ema = Ema(self.params, 0.9)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            for param in self.params.values():
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            torch.manual_seed(step)
            self.optimizer.step()
            self.ema.update(step)

    def everything(self) -> dict[str, Tensor]:
        tensors, numbers = split_optimizer(self.params, self.optimizer)
        shadows = {f"ema {name}": value for name, value in self.ema.shadow.items()}
        return {**self.params, **tensors, **shadows, **{key: torch.tensor(value) for key, value in numbers.items()}}


SHAPES = {"dit.a.weight": (6, 4), "dit.a.bias": (6,), "dit.b.weight": (4, 6)}


def state(step: int, **changes: object) -> State:
    return State(step, 100, {"a": 1}, {"b": 2}, **changes)  # type: ignore[arg-type]


def save(toy: Toy, folder: Path, step: int, keep: int = 2) -> Path:
    return StateFolder(folder, Disk()).save(state(step), toy.params, toy.optimizer, toy.ema, keep=keep)


@pytest.mark.ledger("FS-05")
@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_optimizer_goes_on_bit_for_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    straight, cut, resumed = (Toy(BUILDERS[name], dtype) for _ in range(3))
    straight.steps(0, 7)
    cut.steps(0, 3)
    path = save(cut, tmp_path, 3)
    restore(path, resumed.params, resumed.optimizer, resumed.ema)
    resumed.steps(3, 7)
    one, other = straight.everything(), resumed.everything()
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype, key
        assert torch.equal(one[key], other[key]), key


def test_the_small_part(tmp_path: Path) -> None:
    toy = Toy(BUILDERS["adamw"])
    written = state(12, exact_from=4, skipped_in_row=2, scaler={"scale": 1024.0})
    path = StateFolder(tmp_path, Disk()).save(written, toy.params, toy.optimizer, None, keep=1)
    assert path.name == "step-000012"
    assert read_state(path) == written
    assert not (path / "ema.safetensors").exists()
    (path / "state.json").write_text("{")
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_state(path)


def test_optimizer_state_that_no_file_can_hold() -> None:
    param = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([param], lr=1.0)
    optimizer.state[param]["odd"] = object()
    with pytest.raises(StorageError, match="odd"):
        split_optimizer({"a": param}, optimizer)


def test_a_state_of_other_tensors_is_refused(tmp_path: Path) -> None:
    toy = Toy(BUILDERS["adamw"])
    path = save(toy, tmp_path, 1)
    fewer = {name: param for name, param in toy.params.items() if name != "dit.a.bias"}
    with pytest.raises(ModelFileError, match=r"dit\.a\.bias"):
        restore(path, fewer, toy.optimizer, None)
    with pytest.raises(ModelFileError, match="not trained"):
        join_optimizer(fewer, toy.optimizer, {"dit.a.bias|exp_avg": torch.zeros(6)}, {})


def test_a_state_of_other_shapes_is_refused(tmp_path: Path) -> None:
    toy = Toy(BUILDERS["adamw"])
    path = save(toy, tmp_path, 1)
    other = {**toy.params, "dit.a.weight": nn.Parameter(torch.zeros(1, 4))}
    with pytest.raises(ModelFileError, match=r"dit\.a\.weight"):
        restore(path, other, toy.optimizer, None)


@pytest.mark.ledger("ST-40")
@pytest.mark.ledger("KS-07")
def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    toy = Toy(BUILDERS["adamw"])
    for step in (4, 8, 12, 20):
        save(toy, tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000012", "step-000020"]


def test_a_damaged_state_pushes_no_whole_one_out(tmp_path: Path) -> None:
    """Resumed from 4 because 12 was damaged: saving 8 must not leave only 12 (or 8 pruned at once)."""
    toy = Toy(BUILDERS["adamw"])
    save(toy, tmp_path, 4, keep=1)
    save(toy, tmp_path, 12, keep=2)
    (tmp_path / "step-000012" / "weights.safetensors").write_bytes(b"")
    save(toy, tmp_path, 8, keep=1)
    newest = StateFolder(tmp_path, Disk()).newest()
    assert newest.manifest is not None
    assert newest.manifest.extra["step"] == 8
    assert "weights.safetensors" in str(newest.passed_over[0])
    save(toy, tmp_path, 12, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000012"]
    assert StateFolder(tmp_path, Disk()).newest().passed_over == ()


def test_order_is_by_number_and_not_by_time(tmp_path: Path) -> None:
    toy = Toy(BUILDERS["adamw"])
    save(toy, tmp_path, 1_000_000, keep=9)
    save(toy, tmp_path, 999_999, keep=9)
    manifest = StateFolder(tmp_path, Disk()).newest().manifest
    assert manifest is not None
    assert manifest.extra["step"] == 1_000_000


def test_a_state_is_readable_by_everybody_and_holds_no_pickle(tmp_path: Path) -> None:
    path = save(Toy(BUILDERS["adamw"]), tmp_path, 1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    assert json.loads((path / "state.json").read_text())["step"] == 1
    assert all(file.stat().st_mode & 0o044 for file in path.iterdir())
