"""Schedule-free optimizers (Defazio et al. 2024, arXiv 2405.15682): the average of the weights replaces the decay of the rate.

`train()` and `eval()` switch the weights between the point of the gradients and the average; saving and samples use the average.
`name = "wrapper"` puts it around an optimizer of torch (`base`); the others need the extra `optim` (package schedulefree).
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from fluxsmith.config.optimizer import OptionsConfig
from fluxsmith.errors import ConfigError
from fluxsmith.optim import torch as torch_optimizers
from fluxsmith.optim.groups import Group
from fluxsmith.optim.packages import construct, package_class

CLASSES = {"adamw": "AdamWScheduleFree", "radam": "RAdamScheduleFree", "sgd": "SGDScheduleFree"}
OPTIONS = {
    "adamw": ("betas", "eps", "warmup_steps", "r", "weight_lr_power", "foreach"),
    "radam": ("betas", "eps", "r", "weight_lr_power", "foreach", "silent_sgd_phase"),
    "sgd": ("momentum", "warmup_steps", "r", "weight_lr_power", "foreach"),
    "wrapper": ("momentum", "r", "weight_lr_power", "weight_decay_at_y"),
}


class Config(OptionsConfig):
    """Schedule-free AdamW, RAdam and SGD, or any optimizer of torch. Options: `betas`, `eps`, `momentum`, `warmup_steps`, `r`,
    `weight_lr_power`, `foreach`, `silent_sgd_phase`, `weight_decay_at_y`, as far as the method has them."""

    name: Literal["adamw", "radam", "sgd", "wrapper"] = "adamw"
    """The method."""
    base: Literal["adamw", "adam", "sgd", "radam", "nadam", "rmsprop", "adagrad", "adadelta", "adamax", "adafactor", "asgd"] = "adamw"
    """The optimizer inside `wrapper`; its own momentum is best switched off in `base_options`."""
    base_options: dict[str, bool | int | float | str | tuple[float, ...] | None] = {}
    """Further arguments of that optimizer."""
    lr: PositiveFloat = 2.5e-3
    """Learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay."""

    def option_names(self) -> tuple[str, ...]:
        """As OptionsConfig.option_names."""
        return OPTIONS[self.name]

    def is_per_tensor(self) -> bool:
        """The weight of a step in the average counts steps of the whole group."""
        return False

    def require(self) -> None:
        """As OptimizerConfig.require."""
        self._class()

    def _class(self) -> Any:
        return Wrapper if self.name == "wrapper" else package_class("schedulefree", CLASSES[self.name])

    def build(self, groups: Iterable[Group]) -> torch.optim.Optimizer:
        """The optimizer over the groups, switched to training; raises ConfigError without the package."""
        made: Any
        if self.name == "wrapper":
            made = self._wrapper(groups)
        else:
            kind = self._class()
            made = construct(kind, groups, self.lr, {"weight_decay": self.weight_decay, **self.arguments()}, label=self.name)
        made.train()
        return made

    def _wrapper(self, groups: Iterable[Group]) -> "Wrapper":
        inner = torch_optimizers.Config(type="torch", name=self.base, lr=self.lr, weight_decay=self.weight_decay, options=self.base_options)
        try:
            return Wrapper(inner.build(groups), **self.arguments())
        except ValueError as error:
            raise ConfigError("the wrapper does not take these options", why=str(error), fix="correct optim.options") from error


class Wrapper:
    """Any optimizer of torch between a weight average x and a point y of the gradients: y = momentum x + (1 - momentum) z, x averages z.

    `state[param]["z"]` is what the inner optimizer moves; it does not see the entry. Per group: k, lr_max, weight_sum.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        *,
        momentum: float = 0.9,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        weight_decay_at_y: float = 0.0,
    ) -> None:
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum = {momentum}: above 0, at most 1 is expected")
        self.base = base
        self.param_groups, self.state, self.defaults = base.param_groups, base.state, base.defaults
        self.momentum, self.r, self.weight_lr_power, self.weight_decay_at_y = momentum, r, weight_lr_power, weight_decay_at_y
        self.is_training = False

    @torch.no_grad()
    def train(self) -> None:
        """The weights become y."""
        if not self.is_training:
            self._move(1 - self.momentum)
        self.is_training = True

    @torch.no_grad()
    def eval(self) -> None:
        """The weights become the average x."""
        if self.is_training:
            self._move(1 - 1 / self.momentum)
        self.is_training = False

    def _move(self, share: float) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if "z" in self.state.get(param, {}):
                    param.lerp_(self.state[param]["z"], share)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """The inner optimizer's step on z, then the average. A rate of 0 from the start (warm-up) changes nothing."""
        loss = closure() if closure else None
        if not any(group["lr"] or group.get("weight_sum") for group in self.param_groups):
            return loss
        averages: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    averages[param] = self._expose(param, group["lr"] * self.weight_decay_at_y)
        self.base.step()
        for group in self.param_groups:
            share = self._share(group)
            for param in group["params"]:
                if param in averages:
                    self.state[param]["z"] = param.detach().clone()
                    average = averages[param].lerp_(self.state[param]["z"], share)
                    param.copy_(average.lerp_(self.state[param]["z"], 1 - self.momentum))
        return loss

    def _expose(self, param: Tensor, decay: float) -> Tensor:
        """Put z where the weight is; returns x."""
        state = self.state[param]
        z = state.pop("z") if "z" in state else param.detach().clone()
        if decay:
            z.sub_(param, alpha=decay)
            param.sub_(param, alpha=decay * (1 - self.momentum))
        average = param.detach().lerp(z, 1 - 1 / self.momentum)
        param.copy_(z)
        return average

    def _share(self, group: dict[str, Any]) -> float:
        """Weight of this step in the average."""
        group["lr_max"] = max(group["lr"], group.get("lr_max", 0.0))
        weight = (group.get("k", 0) + 1) ** self.r * group["lr_max"] ** self.weight_lr_power
        group["weight_sum"] = group.get("weight_sum", 0.0) + weight
        group["k"] = group.get("k", 0) + 1
        return weight / group["weight_sum"] if group["weight_sum"] else 0.0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients."""
        self.base.zero_grad(set_to_none)
