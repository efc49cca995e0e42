"""AdamW for 16-bit weights: the update is made in fp32 and rounded stochastically, so small steps are not lost.

Decoupled weight decay (Loshchilov & Hutter 2019), stochastic rounding (`rounding.py`). Moments are kept in the weights' type.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from fluxsmith.config.optimizer import OptimizerConfig
from fluxsmith.optim.groups import Group, as_torch_groups
from fluxsmith.optim.rounding import copy_stochastic_


class Config(OptimizerConfig):
    """AdamW with stochastic rounding for bf16 weights (plain AdamW for fp32 ones)."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""

    def build(self, groups: Iterable[Group]) -> torch.optim.Optimizer:
        """The optimizer over the groups."""
        return AdamWBF16(as_torch_groups(groups, self.lr), self.lr, self.betas, eps=self.eps, weight_decay=self.weight_decay)


class AdamWBF16(torch.optim.Optimizer):
    """State per tensor: step, exp_avg, exp_avg_sq. Draws come from torch's global generator (saved in checkpoints)."""

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.999), *, eps: float = 1e-8, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch types it by overload
        """One update of every tensor that has a gradient."""
        loss = closure() if closure else None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        return loss

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            kept = torch.float32 if param.dtype == torch.float16 else param.dtype  # squares of small gradients are zero in fp16
            state["exp_avg"] = torch.zeros_like(param, dtype=kept)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=kept)
        state["step"] += 1
        step, (beta1, beta2) = state["step"].item(), group["betas"]
        gradient = param.grad.float() if param.grad is not None else torch.zeros_like(param)
        first = state["exp_avg"].float().lerp(gradient, 1 - beta1)
        second = state["exp_avg_sq"].float().mul(beta2).addcmul(gradient, gradient, value=1 - beta2)
        denominator = (second.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
        weight = param.float() * (1 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1**step))
        for target, value in ((param, weight), (state["exp_avg"], first), (state["exp_avg_sq"], second)):
            copy_stochastic_(target, value)
