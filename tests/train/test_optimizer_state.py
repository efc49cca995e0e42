"""Optimizer states: what tensors and groups hold survives with types, layout and nesting; what belongs to the config does not travel."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxsmith.errors import ModelFileError, StorageError
from fluxsmith.train.optimizer_state import join_optimizer, split_optimizer


def optimizer(**group: Any) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    params = {"a.weight": nn.Parameter(torch.ones(2, 3)), "b.weight": nn.Parameter(torch.ones(4))}
    made = torch.optim.SGD(
        [{"params": [params["a.weight"]], "name": "a", **group}, {"params": [params["b.weight"]], "name": "b", "lr": 0.5}],
        lr=1.0,
        momentum=0.9,
    )
    return params, made


def there_and_back(params: dict[str, nn.Parameter], made: torch.optim.Optimizer, **group: Any) -> torch.optim.Optimizer:
    tensors, numbers = split_optimizer(params, made)
    assert all(isinstance(tensor, Tensor) for tensor in tensors.values())
    others, fresh = optimizer(**group)
    stored = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}  # as a file does
    join_optimizer(others, fresh, stored, json.loads(json.dumps(numbers)))
    return fresh


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


VALUES: dict[str, Any] = {
    "number": 0.1 + 0.2,
    "infinity": float("inf"),
    "flag": True,
    "nothing": None,
    "word": "y",
    "bytes": torch.arange(6, dtype=torch.uint8),
    "scalar": torch.tensor(3.0),
    "half": torch.ones(2, 3, dtype=torch.bfloat16),
    "turned": torch.arange(6.0).reshape(2, 3).T,
    "list": [torch.ones(2), [], torch.eye(3).T[1:], None],
    "tuple": (1, torch.zeros(1)),
    "dict": {"absmax": torch.ones(3), "deep": {"q": [torch.zeros(2)]}},
}


@pytest.mark.ledger("FS-05")
@pytest.mark.parametrize("key", VALUES)
def test_of_tensors(key: str) -> None:
    params, made = optimizer()
    made.state[params["a.weight"]] = {key: VALUES[key], "other": torch.ones(2, 3)}
    fresh = there_and_back(params, made)
    kept = fresh.state[fresh.param_groups[0]["params"][0]]
    dense = VALUES["list"][2]
    expected = [*VALUES["list"][:2], dense.contiguous(), None] if key == "list" else VALUES[key]
    assert equal(kept, {key: expected, "other": torch.ones(2, 3)})


@pytest.mark.ledger("FS-05")
@pytest.mark.parametrize("key", VALUES)
def test_of_groups(key: str) -> None:
    params, made = optimizer()
    made.param_groups[1][key] = VALUES[key]
    fresh = there_and_back(params, made)
    assert key not in fresh.param_groups[0]
    assert torch.equal(fresh.param_groups[1][key].contiguous(), VALUES[key]) if key == "turned" else key in fresh.param_groups[1]


def test_what_counts_in_place_is_kept() -> None:
    """A tensor of the defaults is shared by the groups; that it equals the default says nothing."""
    params, made = optimizer()
    made.defaults["d_numerator"] = torch.zeros(1)
    for group in made.param_groups:
        group["d_numerator"] = made.defaults["d_numerator"]
    made.defaults["d_numerator"] += 3
    assert float(there_and_back(params, made).param_groups[1]["d_numerator"]) == 3


def test_options_come_from_the_config() -> None:
    """A changed rate, decay or option of the run file is not undone by the state."""
    params, made = optimizer()
    made.param_groups[0].update(lr=0.25, weight_decay=0.3)
    fresh = there_and_back(params, made, momentum=0.5)
    assert (fresh.param_groups[0]["lr"], fresh.param_groups[0]["weight_decay"], fresh.param_groups[0]["momentum"]) == (1.0, 0, 0.5)


def test_older_states_are_read() -> None:
    """Their keys are `tensor|name` with tensors and plain numbers."""
    params, made = optimizer()
    join_optimizer(params, made, {"b.weight|momentum_buffer": torch.full((4,), 2.0)}, {"b.weight|step": 7})
    assert equal(dict(made.state[params["b.weight"]]), {"momentum_buffer": torch.full((4,), 2.0), "step": 7})


def test_a_group_that_the_run_lacks() -> None:
    params, made = optimizer()
    with pytest.raises(ModelFileError, match="group 2, the run has 2"):
        join_optimizer(params, made, {}, {"|2|k": 4})


def test_what_no_file_can_hold() -> None:
    params, made = optimizer()
    made.param_groups[0]["odd"] = object()
    with pytest.raises(StorageError, match=r"\|0\|odd is a object"):
        split_optimizer(params, made)


def test_an_optimizer_is_told() -> None:
    params, made = optimizer()
    told: list[int] = []
    made.after_restore = lambda: told.append(1)  # type: ignore[attr-defined]  # a stand-in
    join_optimizer(params, made, {}, {})
    assert told == [1]
