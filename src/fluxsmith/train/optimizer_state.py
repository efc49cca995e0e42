"""An optimizer's state as named tensors and plain values, and back: what each tensor has, and what each group has counted.

Keys are `tensor name|state name`, for groups `|number|state name`. Lists and dicts become plain values that name their tensors:
`{"list": [{"tensor": "a.weight|Q|0"}, 3]}`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fluxsmith.errors import ModelFileError, StorageError

DIVIDER = "|"  # between a tensor's name and its optimizer state's name
FROM_CONFIG = ("params", "name", "lr", "weight_decay", "initial_lr")  # of a group: set when it is built, and by the schedule
PLAIN = (bool, int, float, str, type(None))


def split_optimizer(params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of tensors and groups as named tensors and plain values. Raises StorageError for what no file can hold."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for full, value in _entries(params, optimizer):
        encoded = _encode(full, value, tensors)
        if encoded != {"tensor": full}:
            numbers[full] = encoded
    return tensors, numbers


def _entries(params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    for name, param in params.items():
        for key, value in optimizer.state.get(param, {}).items():
            yield f"{name}{DIVIDER}{key}", value
    defaults = getattr(optimizer, "defaults", {})  # a wrapper may lack it
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key not in FROM_CONFIG and not _is_default(value, defaults, key):
                yield f"{DIVIDER}{index}{DIVIDER}{key}", value


def _is_default(value: Any, defaults: Mapping[str, Any], key: str) -> bool:
    """True for an option that has its value of the beginning. A tensor may be the default's own one, changed in place."""
    if key not in defaults or isinstance(value, Tensor | list | dict):
        return False
    return value is defaults[key] or bool(value == defaults[key])


def _layout(value: Tensor) -> dict[str, Any]:
    """What a file does not tell about a tensor: a scalar's place, and the strides, on which the bits of a product depend."""
    if value.dim() == 0 and value.device.type != "cpu":
        return {"scalar": "device"}
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return {} if value.is_contiguous() or extent != value.numel() else {"strides": list(value.stride())}


def _encode(full: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """Plain values for `value`; its tensors are added to `tensors`."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        tensors[full] = value.detach()
        return {"tensor": full, **_layout(value)}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(f"{full}{DIVIDER}{index}", part, tensors) for index, part in enumerate(value)]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode(f"{full}{DIVIDER}{key}", part, tensors) for key, part in value.items()}}
    raise StorageError(f"optimizer state {full} is a {type(value).__name__}, which cannot be saved")


def join_optimizer(
    params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """The inverse of split_optimizer; tensors go to their weight's device, scalars to where they were.

    An optimizer with `after_restore()` is told. Raises ModelFileError for tensors or groups that the run does not have.
    """
    inner = set().union(*[_tensor_names(value) for value in numbers.values()])
    plain = {full: tensor for full, tensor in tensors.items() if full not in inner}
    for full, value in [*plain.items(), *numbers.items()]:
        name, _, key = full.partition(DIVIDER)
        if name:
            if name not in params:
                raise ModelFileError(f"the optimizer state names {name}, which is not trained", fix="start a new run")
            target, device = optimizer.state[params[name]], params[name].device
        else:
            index, _, key = key.partition(DIVIDER)
            target = _group(optimizer, int(index))
            device = target["params"][0].device
        target[key] = _decode(value, tensors, device)
    notify = getattr(optimizer, "after_restore", None)
    if callable(notify):
        notify()


def _group(optimizer: torch.optim.Optimizer, index: int) -> dict[str, Any]:
    if index >= len(optimizer.param_groups):
        what = f"the optimizer state has a group {index}, the run has {len(optimizer.param_groups)}"
        raise ModelFileError(what, fix="set the learning rates of groups back, or start a new run")
    return optimizer.param_groups[index]


def _tensor_names(value: Any) -> set[str]:
    """Names of the tensors inside an encoded value."""
    if not isinstance(value, dict):
        return set()
    if "tensor" in value:
        return {value["tensor"]}
    parts = value.get("list") or value.get("tuple") or [*value.get("dict", {}).values()]
    return set().union(*map(_tensor_names, parts))


def _decode(value: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device) if value.dim() else value
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        found = tensors[value["tensor"]]
        if "strides" in value:
            return torch.empty_strided(found.shape, value["strides"], dtype=found.dtype, device=device).copy_(found)
        return found.to(device) if "scalar" in value else _decode(found, tensors, device)
    if "dict" in value:
        return {key: _decode(part, tensors, device) for key, part in value["dict"].items()}
    parts = [_decode(part, tensors, device) for part in value.get("list", value.get("tuple", []))]
    return tuple(parts) if "tuple" in value else parts
