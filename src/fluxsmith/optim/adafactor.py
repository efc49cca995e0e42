"""Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) with the options and the arithmetic of the class in transformers.

The second moment of a matrix is kept as its row and column means. Two ways to use it:
a rate of one's own (`relative_step = false`, the default here), or one that it finds (`options = { relative_step = true }`).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from pydantic import NonNegativeFloat, model_validator
from torch import Tensor

from fluxsmith.config.optimizer import OptionsConfig
from fluxsmith.optim.groups import Group
from fluxsmith.optim.packages import construct
from fluxsmith.optim.rounding import copy_stochastic_

OPTIONS = ("relative_step", "scale_parameter", "warmup_init", "clip_threshold", "beta1", "decay_rate", "eps")


class Config(OptionsConfig):
    """Adafactor. Options: `relative_step`, `scale_parameter`, `warmup_init` (all off), `clip_threshold`, `beta1`, `decay_rate`, `eps`.

    With `relative_step` it makes its own rate: `lr` and `schedule` are not used.
    """

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""

    def option_names(self) -> tuple[str, ...]:
        """As OptionsConfig.option_names."""
        return OPTIONS

    def uses_schedule(self) -> bool:
        """As OptimizerConfig.uses_schedule."""
        return not self.options.get("relative_step", False)

    @model_validator(mode="after")
    def _warmup_is_of_the_relative_step(self) -> "Config":
        if self.options.get("warmup_init") and not self.options.get("relative_step"):
            raise ValueError("warmup_init belongs to relative_step: set both to true, or use schedule.warmup")
        return self

    def build(self, groups: Iterable[Group]) -> torch.optim.Optimizer:
        """The optimizer over the groups; with `relative_step` their rates are None."""
        optimizer = construct(Adafactor, groups, self.lr, {"weight_decay": self.weight_decay, **self.arguments()}, label="adafactor")
        if not self.uses_schedule():
            for group in optimizer.param_groups:
                group["lr"] = None
        return optimizer


class Adafactor(torch.optim.Optimizer):
    """State per tensor, in fp32: exp_avg_sq_row and exp_avg_sq_col, or exp_avg_sq for one axis; exp_avg with beta1; step.

    `rate` of a group is the learning rate last used for its first tensor. Draws for bf16 come from torch's global generator.
    """

    def __init__(self, params: Any, lr: float, **options: Any) -> None:
        defaults = {
            "lr": lr, "weight_decay": 0.0, "relative_step": False, "scale_parameter": False, "warmup_init": False,
            "clip_threshold": 1.0, "beta1": None, "decay_rate": -0.8, "eps": (1e-30, 1e-3),
        }  # fmt: skip
        if len(options.get("eps", (0, 0))) != 2:
            raise ValueError("eps has two values: one for squares of gradients, one for the scale of a tensor")
        super().__init__(params, {**defaults, **options})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch types it by overload
        """One update of every tensor that has a gradient."""
        loss = closure() if closure else None
        for group in self.param_groups:
            rates = [self._update(param, param.grad.float(), group) for param in group["params"] if param.grad is not None]
            group["rate"] = float(rates[0]) if rates else None
        return loss

    def _update(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> float | Tensor:
        state, weight = self.state[param], param.float()
        state["step"] = state.get("step", 0) + 1
        rate = learning_rate(group, state["step"], weight)
        update = self._scaled(state, gradient, group)
        update.div_((rms(update) / group["clip_threshold"]).clamp_(min=1.0)).mul_(rate)
        if group["beta1"] is not None:
            first = state.setdefault("exp_avg", torch.zeros_like(gradient))
            update = first.mul_(group["beta1"]).add_(update, alpha=1 - group["beta1"])
        if group["weight_decay"]:
            weight = weight + weight * (-group["weight_decay"] * rate)
        copy_stochastic_(param, weight - update)
        return rate

    def _scaled(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """The gradient over the root of its second moment, which is renewed."""
        beta = 1.0 - state["step"] ** group["decay_rate"]
        square = gradient**2 + group["eps"][0]
        if gradient.dim() < 2:
            second = state.setdefault("exp_avg_sq", torch.zeros_like(gradient))
            return second.mul_(beta).add_(square, alpha=1.0 - beta).rsqrt().mul_(gradient)
        row = state.setdefault("exp_avg_sq_row", gradient.new_zeros(gradient.shape[:-1]))
        column = state.setdefault("exp_avg_sq_col", gradient.new_zeros(gradient.shape[:-2] + gradient.shape[-1:]))
        row.mul_(beta).add_(square.mean(dim=-1), alpha=1.0 - beta)
        column.mul_(beta).add_(square.mean(dim=-2), alpha=1.0 - beta)
        row_factor = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
        return (row_factor * column.unsqueeze(-2).rsqrt()).mul_(gradient)


def rms(tensor: Tensor) -> Tensor:
    """Root of the mean square."""
    return tensor.norm(2) / math.sqrt(tensor.numel())


def learning_rate(group: dict[str, Any], step: int, weight: Tensor) -> float | Tensor:
    """The rate of a tensor: given, or min(0.01, 1/sqrt(step)); times the tensor's own scale if asked for."""
    rate = group["lr"]
    if group["relative_step"]:
        rate = min(1e-6 * step if group["warmup_init"] else 1e-2, 1.0 / math.sqrt(step))
    return rate * rms(weight).clamp(min=group["eps"][1]) if group["scale_parameter"] else rate
