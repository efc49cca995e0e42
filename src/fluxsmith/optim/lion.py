"""Lion (Chen et al. 2023, arXiv 2302.06675): the sign of an interpolated momentum, with decoupled weight decay.

Rates are three to ten times smaller than AdamW's, the decay larger by the same factor. bf16 weights are rounded stochastically.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from fluxsmith.config.optimizer import OptionsConfig
from fluxsmith.optim.groups import Group
from fluxsmith.optim.packages import construct
from fluxsmith.optim.rounding import copy_stochastic_


class Config(OptionsConfig):
    """Lion. Options: `betas`."""

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""

    def option_names(self) -> tuple[str, ...]:
        """As OptionsConfig.option_names."""
        return ("betas",)

    def build(self, groups: Iterable[Group]) -> torch.optim.Optimizer:
        """The optimizer over the groups."""
        return construct(Lion, groups, self.lr, {"weight_decay": self.weight_decay, **self.arguments()}, label="lion")


class Lion(torch.optim.Optimizer):
    """State per tensor: exp_avg, in the weight's type. Draws for bf16 come from torch's global generator."""

    def __init__(self, params: Any, lr: float = 1e-4, *, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        if not all(0 <= beta < 1 for beta in betas) or len(betas) != 2:
            raise ValueError(f"betas = {betas}: two numbers from 0 to below 1 are expected")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch types it by overload
        """One update of every tensor that has a gradient."""
        loss = closure() if closure else None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad.float(), group)
        return loss

    def _update(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[param], group["betas"]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
        momentum = state["exp_avg"].float()
        direction = (momentum * beta1).add_(gradient, alpha=1 - beta1).sign_()
        weight = param.float() * (1 - group["lr"] * group["weight_decay"])
        copy_stochastic_(param, weight.add_(direction, alpha=-group["lr"]))
        copy_stochastic_(state["exp_avg"], (momentum * beta2).add_(gradient, alpha=1 - beta2))
