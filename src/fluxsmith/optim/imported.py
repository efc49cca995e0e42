"""Any optimizer class by dotted path, named on the command line too: `--plugin my_pkg.my_mod.MyOptimizer`.

A run file alone imports nothing foreign; classes of `torch.optim` need no permission.
"""

from collections.abc import Iterable

import torch
from pydantic import AliasChoices, Field, ValidationInfo, field_validator

from fluxsmith.config.foreign import check_allowed
from fluxsmith.config.optimizer import OptionsConfig
from fluxsmith.errors import ConfigError
from fluxsmith.optim.groups import Group
from fluxsmith.optim.packages import accepted, construct, package_class, takes


class Config(OptionsConfig):
    """An optimizer class of an installed package. Options: the arguments of the class."""

    path: str = Field(validation_alias=AliasChoices("path", "class"))
    """Dotted path of the class, for example `my_pkg.my_mod.MyOptimizer`; allow it with --plugin."""

    @field_validator("path")
    @classmethod
    def _is_allowed(cls, value: str, info: ValidationInfo) -> str:
        return check_allowed(value, info)

    def is_per_tensor(self) -> bool:
        """Nobody knows."""
        return False

    def build(self, groups: Iterable[Group]) -> torch.optim.Optimizer:
        """The optimizer over the groups; raises ConfigError if the class cannot be imported or is none."""
        module, _, name = self.path.rpartition(".")
        kind = package_class(module, name, extra="")
        decay = {"weight_decay": self.weight_decay} if takes(kind, "weight_decay") or accepted(kind) is None else {}
        made = construct(kind, groups, self.lr, {**decay, **self.arguments()}, label=name)
        if not all(hasattr(made, part) for part in ("param_groups", "state", "step")):
            raise ConfigError(f"{self.path} is no optimizer", fix="name a subclass of torch.optim.Optimizer")
        begin = getattr(made, "train", None)  # schedule-free optimizers
        if callable(begin):
            begin()
        return made
