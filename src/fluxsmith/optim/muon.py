"""Muon for matrices and convolution kernels, AdamW for the rest (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

The momentum of every tensor with two or more axes is reshaped to (out, rest) and orthogonalised by Newton-Schulz steps;
the update is scaled by 0.2 sqrt(max(out, rest)), so that AdamW's learning rates carry over (Liu et al. 2025, Moonlight).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from fluxsmith.config.optimizer import OptimizerConfig
from fluxsmith.optim.groups import Group, as_torch_groups

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the quintic of the reference


class Config(OptimizerConfig):
    """Muon on kernels and matrices, AdamW on biases, norms and embeddings of one axis."""

    lr: PositiveFloat = 3e-3
    """Learning rate of both parts."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Nesterov momentum."""
    newton_schulz_steps: PositiveInt = 5
    """Iterations of the orthogonalisation."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Moments of the AdamW part."""

    def build(self, groups: Iterable[Group]) -> torch.optim.Optimizer:
        """The optimizer over the groups."""
        return Muon(as_torch_groups(groups, self.lr), self)


class Muon(torch.optim.Optimizer):
    """State per tensor: momentum (axes >= 2), or step, exp_avg and exp_avg_sq."""

    def __init__(self, params: Any, config: Config) -> None:
        self.newton_schulz_steps = config.newton_schulz_steps
        defaults = {"lr": config.lr, "momentum": config.momentum, "betas": config.betas, "weight_decay": config.weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch types it by overload
        """One update of every tensor that has a gradient."""
        loss = closure() if closure else None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    update = self._orthogonal if param.dim() >= 2 else self._adamw
                    update(param, param.grad, group)
        return loss

    def _orthogonal(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["momentum"] = torch.zeros_like(param)
        momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(momentum, group["momentum"]).flatten(1)
        update = orthogonalise(direction, self.newton_schulz_steps) * (0.2 * max(direction.shape) ** 0.5)
        param.add_(update.view_as(param), alpha=-group["lr"])

    def _adamw(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        state["step"] += 1
        (beta1, beta2), step = group["betas"], state["step"].item()
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(1e-8)
        param.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1**step))


def orthogonalise(matrix: Tensor, steps: int) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values of (out, rest) are driven to about 1."""
    a, b, c = COEFFICIENTS
    x = matrix / (matrix.norm() + 1e-7)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T
