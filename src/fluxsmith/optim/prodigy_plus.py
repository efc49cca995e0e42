"""Prodigy with schedule-free averaging, factored moments and stochastic rounding (what SimpleTuner calls `prodigy`).

`lr` is a factor on the rate that is found. Needs the extra `optim` (package prodigy-plus-schedule-free).
"""

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat

from fluxsmith.config.optimizer import OptionsConfig
from fluxsmith.optim.groups import Group
from fluxsmith.optim.packages import construct, package_class

OPTIONS = (
    "betas", "beta3", "weight_decay_by_lr", "d0", "d_coef", "d_limiter", "prodigy_steps", "schedulefree_c", "eps", "split_groups",
    "split_groups_mean", "factored", "factored_fp32", "use_bias_correction", "use_stableadamw", "use_schedulefree", "use_speed",
    "stochastic_rounding", "use_cautious", "use_grams", "use_adopt", "use_orthograd", "use_focus",
)  # fmt: skip


class Config(OptionsConfig):
    """Prodigy and schedule-free in one. Options: the arguments of ProdigyPlusScheduleFree (`d_coef`, `prodigy_steps`, `use_speed`, ...)."""

    lr: PositiveFloat = 1.0
    """Factor on the rate that is found."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay."""

    def option_names(self) -> tuple[str, ...]:
        """As OptionsConfig.option_names."""
        return OPTIONS

    def is_per_tensor(self) -> bool:
        """Tensors of a group share the estimate."""
        return False

    def require(self) -> None:
        """As OptimizerConfig.require."""
        self._class()

    def _class(self) -> Any:
        return package_class("prodigyplus", "ProdigyPlusScheduleFree", package="prodigy-plus-schedule-free")

    def build(self, groups: Iterable[Group]) -> torch.optim.Optimizer:
        """The optimizer over the groups, switched to training; raises ConfigError without the package."""
        kind = self._class()
        made: Any = construct(kind, groups, self.lr, {"weight_decay": self.weight_decay, **self.arguments()}, label="prodigy_plus")
        made.train()
        return made
