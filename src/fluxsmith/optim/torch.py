"""Optimizers of torch by name: `optim = { type = "torch", name = "adamw", lr = 1e-4, options = { betas = [0.9, 0.99] } }`.

Nesterov SGD is `name = "sgd", options = { momentum = 0.9, nesterov = true }`. Rprop has step sizes of its own: no schedule reaches it.
"""

from collections.abc import Iterable
from typing import Literal

import torch

from fluxsmith.config.optimizer import OptionsConfig
from fluxsmith.optim.groups import Group
from fluxsmith.optim.packages import construct, takes

CLASSES = {
    "adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "radam": "RAdam", "nadam": "NAdam", "rmsprop": "RMSprop", "adagrad": "Adagrad",
    "adadelta": "Adadelta", "adamax": "Adamax", "adafactor": "Adafactor", "asgd": "ASGD", "rprop": "Rprop",
}  # fmt: skip
HALF_EPS = 1e-4  # for fp16 weights, unless given: their moments are fp16 too, where 1e-8 is zero and nothing bounds a step
SWITCHES = ("maximize", "foreach", "capturable", "differentiable")
OPTIONS = {
    "adamw": ("betas", "eps", "amsgrad", "fused", *SWITCHES),
    "adam": ("betas", "eps", "amsgrad", "fused", "decoupled_weight_decay", *SWITCHES),
    "sgd": ("momentum", "dampening", "nesterov", "fused", "maximize", "foreach", "differentiable"),
    "radam": ("betas", "eps", "decoupled_weight_decay", *SWITCHES),
    "nadam": ("betas", "eps", "momentum_decay", "decoupled_weight_decay", *SWITCHES),
    "rmsprop": ("alpha", "eps", "momentum", "centered", *SWITCHES),
    "adagrad": ("lr_decay", "initial_accumulator_value", "eps", "fused", "maximize", "foreach", "differentiable"),
    "adadelta": ("rho", "eps", *SWITCHES),
    "adamax": ("betas", "eps", *SWITCHES),
    "adafactor": ("beta2_decay", "eps", "d", "foreach", "maximize"),
    "asgd": ("lambd", "alpha", "t0", *SWITCHES),
    "rprop": ("etas", "step_sizes", *SWITCHES),
}


class Config(OptionsConfig):
    """Any optimizer class of torch."""

    name: Literal["adamw", "adam", "sgd", "radam", "nadam", "rmsprop", "adagrad", "adadelta", "adamax", "adafactor", "asgd", "rprop"] = (
        "adamw"
    )
    """The optimizer."""

    def option_names(self) -> tuple[str, ...]:
        """As OptionsConfig.option_names."""
        return OPTIONS[self.name]

    def build(self, groups: Iterable[Group]) -> torch.optim.Optimizer:
        """The optimizer over the groups; raises ConfigError for values that the class refuses."""
        kind = getattr(torch.optim, CLASSES[self.name])
        decay = {"weight_decay": self.weight_decay} if takes(kind, "weight_decay") else {}
        groups = list(groups)
        if any(param.dtype == torch.float16 for group in groups for param in group.params) and "eps" in self.option_names():
            decay = {**decay, "eps": HALF_EPS}
        return construct(kind, groups, self.lr, {**decay, **self.arguments()}, label=self.name)
