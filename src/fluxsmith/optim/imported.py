"""Any optimizer class by dotted path, named on the command line too: `--plugin my_pkg.my_mod.MyOptimizer`.

A run file alone imports nothing foreign; classes of `torch.optim` need no permission.
"""

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import AliasChoices, Field, NonNegativeFloat, ValidationInfo, field_validator

from fluxsmith.config.foreign import check_allowed
from fluxsmith.config.optimizer import OptionsConfig
from fluxsmith.errors import ConfigError
from fluxsmith.optim.groups import Group
from fluxsmith.optim.packages import construct, package_class


class Config(OptionsConfig):
    """An optimizer class of an installed package. Options: the arguments of the class."""

    path: str = Field(validation_alias=AliasChoices("path", "class"))
    """Dotted path of the class, for example `my_pkg.my_mod.MyOptimizer`; allow it with --plugin."""

    weight_decay: NonNegativeFloat | None = None  # type: ignore[assignment]  # others have a default of their own
    """Weight decay; by default that of the class."""

    @field_validator("path")
    @classmethod
    def _is_allowed(cls, value: str, info: ValidationInfo) -> str:
        return check_allowed(value, info)

    def is_per_tensor(self) -> bool:
        """Nobody knows."""
        return False

    def require(self) -> None:
        """As OptimizerConfig.require."""
        self._class()

    def _class(self) -> Any:
        return package_class(*self.path.rsplit(".", 1), extra="")

    def build(self, groups: Iterable[Group]) -> torch.optim.Optimizer:
        """The optimizer over the groups; raises ConfigError if the class cannot be imported or is none."""
        kind, name = self._class(), self.path.rpartition(".")[2]
        decay = {"weight_decay": self.weight_decay} if self.weight_decay is not None else {}
        made = construct(kind, groups, self.lr, {**decay, **self.arguments()}, label=name)
        if not all(hasattr(made, part) for part in ("param_groups", "state", "step")):
            raise ConfigError(f"{self.path} is no optimizer", fix="name a subclass of torch.optim.Optimizer")
        begin = getattr(made, "train", None)  # schedule-free optimizers
        if callable(begin):
            begin()
        return made
