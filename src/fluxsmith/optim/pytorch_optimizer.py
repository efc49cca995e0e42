"""A choice of the package pytorch_optimizer: CAME, SOAP, StableAdamW and others, tried here with files, groups and resume.

Needs the extra `optim`. Classes that are not listed go through `type = "imported"`.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch

from fluxsmith.config.optimizer import OptionsConfig
from fluxsmith.optim.groups import Group
from fluxsmith.optim.packages import construct, package_class

CLASSES = {
    "came": "CAME", "soap": "SOAP", "stableadamw": "StableAdamW", "adan": "Adan", "ademamix": "AdEMAMix", "adabelief": "AdaBelief",
    "lamb": "Lamb", "tiger": "Tiger",
}  # fmt: skip
OPTIONS = {
    "came": ("betas", "weight_decouple", "fixed_decay", "clip_threshold", "ams_bound", "eps1", "eps2"),
    "soap": ("betas", "shampoo_beta", "precondition_frequency", "max_precondition_dim", "merge_dims", "precondition_1d", "correct_bias",
             "normalize_gradient", "eps"),
    "stableadamw": ("betas", "kahan_sum", "weight_decouple", "eps"),
    "adan": ("betas", "weight_decouple", "max_grad_norm", "eps"),
    "ademamix": ("betas", "weight_decouple", "fixed_decay", "alpha", "t_alpha_beta3", "eps"),
    "adabelief": ("betas", "weight_decouple", "fixed_decay", "rectify", "ams_bound", "eps"),
    "lamb": ("betas", "weight_decouple", "fixed_decay", "rectify", "degenerated_to_sgd", "grad_averaging", "max_grad_norm", "adam", "eps"),
    "tiger": ("beta", "weight_decouple", "fixed_decay"),
}  # fmt: skip


class Config(OptionsConfig):
    """CAME, SOAP, StableAdamW, Adan, AdEMAMix, AdaBelief, LAMB, Tiger. Options: the arguments of the class."""

    name: Literal["came", "soap", "stableadamw", "adan", "ademamix", "adabelief", "lamb", "tiger"] = "came"
    """The optimizer."""

    def option_names(self) -> tuple[str, ...]:
        """As OptionsConfig.option_names."""
        return OPTIONS[self.name]

    def is_per_tensor(self) -> bool:
        """The classes count steps per group, and some clip over all tensors."""
        return False

    def require(self) -> None:
        """As OptimizerConfig.require."""
        self._class()

    def _class(self) -> Any:
        return package_class("pytorch_optimizer", CLASSES[self.name])

    def build(self, groups: Iterable[Group]) -> torch.optim.Optimizer:
        """The optimizer over the groups; raises ConfigError without the package."""
        kind = self._class()
        return construct(kind, groups, self.lr, {"weight_decay": self.weight_decay, **self.arguments()}, label=self.name)
