"""Prodigy (Mishchenko & Defazio 2023, arXiv 2306.06101): Adam whose rate is estimated from the distance the weights have gone.

`lr` is a factor on what it finds, 1 as a rule. Groups may have different factors: the estimate is then made in weights divided
by their factor, which equals the published rule where the factors are equal. bf16 weights are rounded stochastically.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from fluxsmith.config.optimizer import OptionsConfig
from fluxsmith.optim.groups import Group
from fluxsmith.optim.packages import construct
from fluxsmith.optim.rounding import copy_stochastic_

OPTIONS = ("betas", "beta3", "eps", "decouple", "use_bias_correction", "safeguard_warmup", "d0", "d_coef", "growth_rate", "slice_p")


class Config(OptionsConfig):
    """Prodigy. Options: `betas`, `beta3`, `eps`, `decouple`, `use_bias_correction`, `safeguard_warmup`, `d0`, `d_coef`, `growth_rate`,
    `slice_p` (the estimate reads every n-th weight, which saves memory)."""

    lr: PositiveFloat = 1.0
    """Factor on the rate that is found."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay, decoupled unless `decouple = false`."""

    def option_names(self) -> tuple[str, ...]:
        """As OptionsConfig.option_names."""
        return OPTIONS

    def is_per_tensor(self) -> bool:
        """All tensors share the estimate."""
        return False

    def build(self, groups: Iterable[Group]) -> torch.optim.Optimizer:
        """The optimizer over the groups."""
        return construct(Prodigy, groups, self.lr, {"weight_decay": self.weight_decay, **self.arguments()}, label="prodigy")


class Pace(NamedTuple):
    """Rates of one step: the estimate, the largest factor of a group, Adam's bias correction."""

    d: float
    lr: float
    bias: float


class Prodigy(torch.optim.Optimizer):
    """State per tensor, in fp32: exp_avg, exp_avg_sq, s and p0 (every slice_p-th weight). Per group: d, d_max, d_numerator, k."""

    def __init__(self, params: Any, lr: float = 1.0, **options: Any) -> None:
        defaults = {
            "lr": lr, "betas": (0.9, 0.999), "beta3": None, "eps": 1e-8, "weight_decay": 0.0, "decouple": True,
            "use_bias_correction": False, "safeguard_warmup": False, "d0": 1e-6, "d_coef": 1.0, "growth_rate": math.inf, "slice_p": 1,
            **options,
        }  # fmt: skip
        if defaults["d0"] <= 0 or defaults["slice_p"] < 1:
            raise ValueError("d0 must be above 0, slice_p at least 1")
        super().__init__(params, {**defaults, "d": defaults["d0"], "d_max": defaults["d0"], "d_numerator": 0.0, "k": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch types it by overload
        """One update of every tensor that has a gradient."""
        loss = closure() if closure else None
        first = self.param_groups[0]
        beta1, beta2 = first["betas"]
        k = first["k"] + 1
        bias = math.sqrt(1 - beta2**k) / (1 - beta1**k) if first["use_bias_correction"] else 1.0
        pace = Pace(first["d"], max(group["lr"] for group in self.param_groups), bias)
        numerator, denominator = self._observe(pace)
        if denominator == 0:
            return loss
        self._estimate(pace, numerator, denominator)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group, pace)
            group["k"] += 1
        return loss

    def _observe(self, pace: Pace) -> tuple[float, float]:
        """Renew the moments; what this step adds to the numerator, and the whole denominator."""
        numerator: Tensor | float = 0.0
        denominator: Tensor | float = 0.0
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                gradient = param.grad.float()
                if group["weight_decay"] and not group["decouple"]:
                    gradient = gradient + param.float() * group["weight_decay"]
                state = self._state(param, group)
                if group["lr"] > 0:
                    product, total = self._observe_tensor(param, gradient, state, group, pace=pace)
                    numerator, denominator = numerator + product, denominator + total
        return float(numerator), float(denominator)

    def _state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[param]
        if not state:
            sliced = param.detach().flatten()[:: group["slice_p"]]
            state["p0"] = sliced.clone()
            state["s"] = torch.zeros_like(sliced, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
        return state

    def _observe_tensor(
        self, param: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], *, pace: Pace
    ) -> tuple[Tensor, Tensor]:
        (beta1, beta2), d, relative = group["betas"], pace.d, pace.d / group["d0"]
        beta3 = math.sqrt(beta2) if group["beta3"] is None else group["beta3"]
        sliced = gradient.flatten()[:: group["slice_p"]]
        way = state["p0"].float() - param.flatten()[:: group["slice_p"]].float()
        state["exp_avg"].mul_(beta1).add_(gradient, alpha=d * (1 - beta1))
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=d * d * (1 - beta2))
        own = group["lr"] / pace.lr
        weight = relative * d * (own if group["safeguard_warmup"] else group["lr"] * pace.bias)
        state["s"].mul_(beta3).add_(sliced, alpha=weight)
        product = torch.dot(sliced, way).double() * (relative * d * pace.lr * pace.bias)
        return product, state["s"].abs().sum().double()

    def _estimate(self, pace: Pace, numerator: float, denominator: float) -> None:
        """The distance estimate of the steps from now on, in all groups."""
        first = self.param_groups[0]
        beta3 = math.sqrt(first["betas"][1]) if first["beta3"] is None else first["beta3"]
        total = first["d_numerator"] * beta3 + numerator
        d_hat = first["d_coef"] * total / denominator
        d = max(pace.d, d_hat) if pace.d == first["d0"] else pace.d
        d_max = max(first["d_max"], d_hat)
        for group in self.param_groups:
            group.update(d_numerator=total, d_max=d_max, d=min(d_max, d * first["growth_rate"]))

    def _update(self, param: Tensor, group: dict[str, Any], pace: Pace) -> None:
        state, rate = self.state[param], pace.d * group["lr"] * pace.bias
        denominator = state["exp_avg_sq"].sqrt().add_(group["d"] * group["eps"])
        weight = param.float()
        if group["weight_decay"] and group["decouple"]:
            weight = weight.add(weight, alpha=-group["weight_decay"] * rate)
        newer = group["d"] / pace.d if group["betas"][0] == 0 else 1.0  # without momentum the step reads the new estimate
        copy_stochastic_(param, weight.addcdiv(state["exp_avg"], denominator, value=-rate * newer))
