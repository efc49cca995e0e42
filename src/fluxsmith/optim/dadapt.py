"""D-Adaptation (Defazio & Mishchenko 2023, arXiv 2301.07733): AdaGrad, Adam, Lion, SGD and Adan that find their rate.

`lr` is a factor on what is found, 1 as a rule, and the same for all groups. Needs the extra `optim` (package dadaptation).
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat

from fluxsmith.config.optimizer import OptionsConfig
from fluxsmith.errors import ConfigError
from fluxsmith.optim.groups import Group, as_torch_groups
from fluxsmith.optim.packages import construct, package_class

CLASSES = {
    "adam": ("dadaptation", "DAdaptAdam"), "adagrad": ("dadaptation", "DAdaptAdaGrad"), "lion": ("dadaptation", "DAdaptLion"),
    "sgd": ("dadaptation", "DAdaptSGD"), "adan": ("dadaptation", "DAdaptAdan"),
    "adan_ip": ("dadaptation.experimental", "DAdaptAdanIP"), "adam_preprint": ("dadaptation.experimental", "DAdaptAdamPreprint"),
}  # fmt: skip
OPTIONS = {
    "adam": ("betas", "eps", "decouple", "use_bias_correction", "d0", "growth_rate"),
    "adagrad": ("momentum", "eps", "d0", "growth_rate"),
    "lion": ("betas", "d0"),
    "sgd": ("momentum", "d0", "growth_rate"),
    "adan": ("betas", "eps", "no_prox", "d0", "growth_rate"),
    "adan_ip": ("betas", "eps", "no_prox", "d0", "growth_rate"),
    "adam_preprint": ("betas", "eps", "decouple", "d0", "growth_rate"),
}


class Config(OptionsConfig):
    """D-Adaptation. Options: `d0`, `growth_rate` and those of the method (`betas`, `eps`, `decouple`, `momentum`, `no_prox`)."""

    name: Literal["adam", "adagrad", "lion", "sgd", "adan", "adan_ip", "adam_preprint"] = "adam"
    """The method."""
    lr: PositiveFloat = 1.0
    """Factor on the rate that is found."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay; decoupled in adan, adan_ip and lion, in the others with `decouple = true`."""

    def option_names(self) -> tuple[str, ...]:
        """As OptionsConfig.option_names."""
        return OPTIONS[self.name]

    def is_per_tensor(self) -> bool:
        """All tensors share the estimate."""
        return False

    def has_one_rate(self) -> bool:
        """The methods know one rate."""
        return True

    def require(self) -> None:
        """As OptimizerConfig.require."""
        self._class()

    def _class(self) -> Any:
        return package_class(*CLASSES[self.name])

    def build(self, groups: Iterable[Group]) -> torch.optim.Optimizer:
        """The optimizer over the groups; raises ConfigError for groups with different rates, or without the package."""
        groups = tuple(groups)
        rates = {group["name"]: group["lr"] for group in as_torch_groups(groups, self.lr)}
        if len(set(rates.values())) > 1:
            told = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
            raise ConfigError(
                "D-Adaptation has one learning rate for everything", why=f"the groups have {told}",
                fix='remove the rates of [adapter] (0 leaves layers out), or use type = "prodigy", which takes them as factors',
            )  # fmt: skip
        kind = self._class()
        kind = resting(kind) if self.name == "sgd" else kind
        return construct(kind, groups, self.lr, {"weight_decay": self.weight_decay, **self.arguments()}, label=self.name)


def resting(kind: Any) -> Any:
    """The class without its division by zero at a rate of 0 (the start of a warm-up, the end of a decay): such a step does nothing."""

    class Resting(kind):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure) if any(group["lr"] for group in self.param_groups) else None

    Resting.__name__ = kind.__name__
    return Resting
