"""Parameter groups: which tensors share a learning rate, with names that logs and resume can rely on."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn


class Group(NamedTuple):
    """Trained tensors with one rate; `lr_factor` multiplies `optim.lr`, or `lr` replaces it."""

    name: str
    params: tuple[nn.Parameter, ...]
    lr: float | None = None
    lr_factor: float = 1.0
    weight_decay: float | None = None


def as_torch_groups(groups: Iterable[Group], lr: float) -> list[dict[str, Any]]:
    """What torch optimizers take; empty groups and groups with rate 0 are left out."""
    result = []
    for group in groups:
        rate = (lr if group.lr is None else group.lr) * group.lr_factor
        if group.params and rate > 0:
            entry: dict[str, Any] = {"name": group.name, "params": list(group.params), "lr": rate}
            if group.weight_decay is not None:
                entry["weight_decay"] = group.weight_decay
            result.append(entry)
    return result
