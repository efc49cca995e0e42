"""Optimizers of torch-optimi: low-precision training by Kahan summation, which keeps what rounding a bf16 weight loses.

Needs the extra `optim` (package torch-optimi). `kahan_sum` is on by itself for bf16 weights and has no effect on fp32 ones.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat

from fluxsmith.config.optimizer import OptionsConfig
from fluxsmith.optim.groups import Group
from fluxsmith.optim.packages import construct, package_class

CLASSES = {
    "stableadamw": "StableAdamW", "adamw": "AdamW", "adam": "Adam", "lion": "Lion", "radam": "RAdam", "ranger": "Ranger", "adan": "Adan",
    "sgd": "SGD",
}  # fmt: skip
SHARED = ("decouple_lr", "max_lr", "kahan_sum", "foreach")
OPTIONS = {
    "stableadamw": ("betas", "eps", *SHARED),
    "adamw": ("betas", "eps", *SHARED),
    "adam": ("betas", "eps", "decouple_wd", *SHARED),
    "lion": ("betas", *SHARED),
    "radam": ("betas", "eps", "decouple_wd", *SHARED),
    "ranger": ("betas", "eps", "k", "alpha", "decouple_wd", *SHARED),
    "adan": ("betas", "eps", "adam_wd", *SHARED),
    "sgd": ("momentum", "dampening", "decouple_wd", "torch_init", *SHARED),
}


class Config(OptionsConfig):
    """Optimizers with Kahan summation for bf16 weights. Options: the arguments of the class."""

    name: Literal["stableadamw", "adamw", "adam", "lion", "radam", "ranger", "adan", "sgd"] = "stableadamw"
    """The optimizer."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay, times the learning rate unless `decouple_lr`."""

    def option_names(self) -> tuple[str, ...]:
        """As OptionsConfig.option_names."""
        return OPTIONS[self.name]

    def require(self) -> None:
        """As OptimizerConfig.require."""
        self._class()

    def _class(self) -> Any:
        return package_class("optimi", CLASSES[self.name], package="torch-optimi")

    def build(self, groups: Iterable[Group]) -> torch.optim.Optimizer:
        """The optimizer over the groups; raises ConfigError without the package."""
        kind = self._class()
        return construct(kind, groups, self.lr, {"weight_decay": self.weight_decay, **self.arguments()}, label=self.name)
