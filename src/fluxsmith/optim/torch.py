"""Optimizers of torch by name: `optim = { type = "torch", name = "adamw", lr = 1e-4, options = { betas = [0.9, 0.99] } }`."""

import inspect
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field

from fluxsmith.config.section import PluginConfig
from fluxsmith.errors import ConfigError
from fluxsmith.optim.groups import Group, as_torch_groups

CLASSES = {
    "adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "radam": "RAdam", "nadam": "NAdam", "rmsprop": "RMSprop", "adagrad": "Adagrad",
    "adadelta": "Adadelta", "adamax": "Adamax", "adafactor": "Adafactor", "asgd": "ASGD", "rprop": "Rprop",
}  # fmt: skip


class Config(PluginConfig):
    """Any optimizer class of torch."""

    name: Literal["adamw", "adam", "sgd", "radam", "nadam", "rmsprop", "adagrad", "adadelta", "adamax", "adafactor", "asgd", "rprop"] = (
        "adamw"
    )
    """The optimizer."""
    lr: float = Field(1e-4, gt=0)
    """Learning rate."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay (adamw), L2 penalty (others)."""
    options: dict[str, bool | int | float | str | tuple[float, float] | None] = {}
    """Further arguments of the class, for example `betas`, `eps`, `momentum`, `nesterov`."""

    def build(self, groups: Iterable[Group]) -> torch.optim.Optimizer:
        """The optimizer over the groups; raises ConfigError for an argument that the class does not have."""
        kind = getattr(torch.optim, CLASSES[self.name])
        known = inspect.signature(kind).parameters
        unknown = sorted(set(self.options) - set(known))
        if unknown:
            names = ", ".join(name for name in known if name not in ("self", "params"))
            raise ConfigError(f"optim.options: {self.name} has no argument {', '.join(unknown)}", fix=f"use one of {names}")
        options = dict(self.options)
        if "weight_decay" in known:
            options.setdefault("weight_decay", self.weight_decay)
        return kind(as_torch_groups(groups, self.lr), lr=self.lr, **options)
