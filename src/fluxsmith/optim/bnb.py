"""Optimizers of bitsandbytes: moments in 8 bits (a byte a weight and moment instead of four), or paged out to host memory.

Tensors of fewer than `min_8bit_size` (4096) weights keep fp32 moments. Needs the extra `optim`; runs on CUDA and on the CPU.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from fluxsmith.config.optimizer import OptionsConfig
from fluxsmith.optim.groups import Group
from fluxsmith.optim.packages import construct, package_class

CLASSES = {
    "adam": "Adam", "adam8bit": "Adam8bit", "paged_adam": "PagedAdam", "paged_adam8bit": "PagedAdam8bit",
    "paged_adam32bit": "PagedAdam32bit", "adamw": "AdamW", "adamw8bit": "AdamW8bit", "paged_adamw": "PagedAdamW",
    "paged_adamw8bit": "PagedAdamW8bit", "paged_adamw32bit": "PagedAdamW32bit", "ademamix": "AdEMAMix", "ademamix8bit": "AdEMAMix8bit",
    "paged_ademamix": "PagedAdEMAMix", "paged_ademamix8bit": "PagedAdEMAMix8bit", "lion": "Lion", "lion8bit": "Lion8bit",
    "paged_lion": "PagedLion", "paged_lion8bit": "PagedLion8bit", "sgd": "SGD", "sgd8bit": "SGD8bit", "adagrad": "Adagrad",
    "adagrad8bit": "Adagrad8bit", "rmsprop": "RMSprop", "rmsprop8bit": "RMSprop8bit",
}  # fmt: skip
OPTIONS = {
    "adam": ("betas", "eps"),
    "adamw": ("betas", "eps"),
    "ademamix": ("betas", "alpha", "t_alpha", "t_beta3", "eps"),
    "lion": ("betas",),
    "sgd": ("momentum", "nesterov"),
    "adagrad": ("eps",),
    "rmsprop": ("alpha", "eps"),
}
PAGE_SIZE = 100_000  # tensors of at least so many weights are paged


class Config(OptionsConfig):
    """Optimizers with 8-bit or paged state. Options: `min_8bit_size` and the method's own (`betas`, `eps`, `momentum`, `nesterov`, ...)."""

    name: Literal[
        "adam", "adam8bit", "paged_adam", "paged_adam8bit", "paged_adam32bit", "adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit",
        "paged_adamw32bit", "ademamix", "ademamix8bit", "paged_ademamix", "paged_ademamix8bit", "lion", "lion8bit", "paged_lion",
        "paged_lion8bit", "sgd", "sgd8bit", "adagrad", "adagrad8bit", "rmsprop", "rmsprop8bit",
    ] = "adamw8bit"  # fmt: skip
    """The optimizer."""

    def option_names(self) -> tuple[str, ...]:
        """As OptionsConfig.option_names."""
        family = self.name.removeprefix("paged_").removesuffix("8bit").removesuffix("32bit")
        return (*OPTIONS[family], "min_8bit_size")

    @model_validator(mode="after")
    def _sgd_has_momentum(self) -> "Config":
        if self.options.get("momentum", 0.9) == 0:
            raise ValueError(f'bitsandbytes has no {self.name} without momentum: leave momentum out (0.9), or use type = "torch"')
        return self

    def require(self) -> None:
        """As OptimizerConfig.require."""
        self._class()

    def _class(self) -> Any:
        return package_class("bitsandbytes.optim", CLASSES[self.name])

    def build(self, groups: Iterable[Group]) -> torch.optim.Optimizer:
        """The optimizer over the groups; raises ConfigError without bitsandbytes."""
        kind = self._class()
        arguments = {"weight_decay": self.weight_decay, **self.arguments()}
        if "sgd" not in self.name:
            kind = paged(kind) if self.name.startswith("paged_") else kind
            return construct(kind, groups, self.lr, arguments, label=self.name)
        is_nesterov = bool(arguments.pop("nesterov", False))
        return construct(nesterov(kind) if is_nesterov else kind, groups, self.lr, {"momentum": 0.9, **arguments}, label=self.name)


def is_host(tensor: Tensor) -> bool:
    """Does it lie in host memory, where paging means nothing?"""
    return tensor.device.type == "cpu"


def paged(kind: Any) -> Any:
    """The class with states that are paged again after a restore; on the CPU, which has nothing to page, without its warning."""

    class Paged(kind):
        def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros_like(p, dtype=dtype) if is_host(p) else super().get_state_buffer(p, dtype)

        def after_restore(self) -> None:
            for param, state in self.state.items():
                for key in ("state1", "state2"):
                    if key in state and not is_host(param) and param.numel() >= PAGE_SIZE:
                        buffer = self.get_state_buffer(param, state[key].dtype)
                        buffer.copy_(state[key])
                        state[key] = buffer

    Paged.__name__ = kind.__name__
    return Paged


def nesterov(kind: Any) -> Any:
    """SGD with Nesterov's momentum, whose flag bitsandbytes takes and does not use.

    w - lr (g + m b) is the class's own step w - lr' b at lr' = m lr, and another one along g at lr (b is the renewed momentum).
    """

    class Nesterov(kind):
        def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
            if p.grad is None:
                return
            gradient, lr = p.grad.to(p.dtype) + p * group["weight_decay"], group["lr"]
            group["lr"] = lr * group["betas"][0]
            try:
                super().update_step(group, p, gindex, pindex)
            finally:
                group["lr"] = lr
            p.add_(gradient, alpha=-lr)

    Nesterov.__name__ = kind.__name__
    return Nesterov
