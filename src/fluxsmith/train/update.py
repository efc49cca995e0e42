"""From gradients to new weights: after the backward pass as a whole, or inside it, so that gradients never live together.

`memory.fused_update = "tensor"` updates each tensor as its gradient arrives; `"block"` waits for all tensors of a transformer block.
Both clip each tensor's own norm: the global one is not known yet.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fluxsmith.config.choice import realise
from fluxsmith.config.schema import RunConfig
from fluxsmith.errors import ConfigError
from fluxsmith.optim.schedules import Rates
from fluxsmith.train.precision import Precision
from fluxsmith.train.setup import Parts

BLOCK = re.compile(r"(dit|[a-z0-9_]+)\.(double_blocks|single_blocks)\.\d+\.(?!img_mod\.|txt_mod\.|modulation\.)")  # these run apart


class Update:
    """The plain way: `begin`, backward, `ready`, `apply`."""

    is_fused = False

    def __init__(self, parts: Parts, precision: Precision) -> None:
        self.parts = parts
        self.precision = precision
        self.optimizer = parts.optimizer
        base = [group["lr"] for group in self.optimizer.param_groups]
        self.rates = Rates(parts.config.schedule, parts.total_steps, base)

    def begin(self, step: int) -> None:
        """Forget gradients and set the learning rates of `step`; an optimizer that finds its own rate (None) keeps it."""
        self.parts.trained.zero_grad()
        for group, rate in zip(self.optimizer.param_groups, self.rates.at(step), strict=True):
            if rate is not None:
                group["lr"] = rate

    def ready(self) -> float:
        """Gradients are complete: average them over processes, clip; returns the norm before clipping."""
        trained, place = self.parts.trained, self.parts.trained.placement
        place.collect()
        self.parts.world.average_gradients(param for name, param in trained.params.items() if name not in place.spans)
        limit = self.parts.config.train.max_grad_norm
        norm = self.precision.clip(self.optimizer, trained.params.values(), limit, norm=lambda: place.norm(trained.params))
        if trained.adapters is not None:
            trained.adapters.after_backward()
        return norm

    def apply(self) -> dict[str, float]:
        """The optimizer step; returns what adapters have to tell about it."""
        self.precision.step(self.optimizer)
        self.parts.trained.placement.publish()
        adapters = self.parts.trained.adapters
        return adapters.after_step() if adapters is not None else {}

    def rate(self) -> float:
        """The learning rate in use, of the first group; the found one of optimizers that find it (`rate`, or `d` times the factor)."""
        group = self.optimizer.param_groups[0]
        rate = group.get("rate") if group["lr"] is None else group["lr"]
        return float(rate or 0.0) * float(group.get("d", 1.0))


class FusedUpdate(Update):
    """Inside the backward pass, in units of a tensor or a block."""

    is_fused = True

    def __init__(self, parts: Parts, precision: Precision) -> None:
        super().__init__(parts, precision)
        _check_optimizer(parts)
        self.is_armed = False
        self.squares = 0.0
        self.groups = {param: group for group in self.optimizer.param_groups for param in group["params"]}
        units = units_of(parts.trained.params, parts.config)
        self.waiting: dict[int, set[nn.Parameter]] = {}
        for number, unit in enumerate(units):
            for param in unit:
                param.register_post_accumulate_grad_hook(self._hook(number, unit))

    def begin(self, step: int) -> None:
        """As Update.begin; from here on a gradient that arrives is used at once."""
        super().begin(step)
        self.squares, self.is_armed = 0.0, True
        self.waiting.clear()

    def _hook(self, number: int, unit: Sequence[nn.Parameter]):
        def arrived(param: Tensor) -> None:
            if not isinstance(param, nn.Parameter):
                return
            if not self.is_armed:  # a trial run
                param.grad = None
                return
            missing = self.waiting.setdefault(number, set(unit))
            missing.discard(param)
            if not missing:
                del self.waiting[number]
                self._update(unit)

        return arrived

    @torch.no_grad()
    def _update(self, unit: Sequence[nn.Parameter]) -> None:
        limit = self.parts.config.train.max_grad_norm
        for param in unit:
            norm = float(torch.nn.utils.clip_grad_norm_([param], limit or float("inf"), error_if_nonfinite=False))
            self.squares += norm**2
        if math.isfinite(self.squares):
            self._gather_state(unit)
            with only(self.optimizer, unit, self.groups):
                self.optimizer.step()
            self.parts.trained.placement.wrote(unit)
        for param in unit:
            param.grad = None

    def _gather_state(self, unit: Sequence[nn.Parameter]) -> None:
        """A swapped tensor may be elsewhere than when its state was made or restored."""
        for param in unit:
            state = self.optimizer.state.get(param, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() and value.device != param.device:
                    state[key] = value.to(param.device)

    def ready(self) -> float:
        """Tensors whose unit got only part of its gradients are updated now; returns the norm over all tensors."""
        left = set().union(*self.waiting.values())
        if self.waiting:
            self.waiting.clear()
            self.parts.trained.placement.publish()
            rest = [param for param in self.groups if param.grad is not None and param not in left]
            for param in rest:
                param.grad = None if param.grad is None else param.grad.to(param.device)
            self._update(rest)
        self.is_armed = False
        return math.sqrt(self.squares) if math.isfinite(self.squares) else math.inf

    def apply(self) -> dict[str, float]:
        """Everything is done already."""
        self.parts.trained.placement.publish()
        return {}


def _check_optimizer(parts: Parts) -> None:
    """Raise ConfigError where an update of one tensor would depend on the others, or on other processes."""
    config, test = parts.config, getattr(realise(parts.config.optim), "is_per_tensor", None)
    if not (test() if test is not None else config.optim.model_dump()["type"] in ("torch", "adamw_bf16")):
        why = f"{config.optim.model_dump()['type']} looks at all tensors as a whole"
        raise ConfigError("this optimizer cannot update inside the backward pass", why=why, fix='write memory.fused_update = "off"')
    if parts.world.size > 1:
        raise ConfigError("a fused update works in one process", fix='write memory.fused_update = "off", or start one process')


def units_of(params: Mapping[str, nn.Parameter], config: RunConfig) -> list[list[nn.Parameter]]:
    """What is updated together: single tensors, or the tensors of a block (the rest one by one)."""
    if config.memory.fused_update == "tensor":
        return [[param] for param in params.values()]
    units: dict[str, list[nn.Parameter]] = {}
    for name, param in params.items():
        match = BLOCK.match(name)
        units.setdefault(match.group() if match else name, []).append(param)
    return [*units.values()]


@contextmanager
def only(
    optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], groups: Mapping[nn.Parameter, dict[str, object]]
) -> Iterator[None]:
    """The optimizer sees these tensors alone for a while; its state stays where it is."""
    kept = {id(groups[param]): (groups[param], groups[param]["params"]) for param in params}
    every = optimizer.param_groups
    optimizer.param_groups = [group for group, _ in kept.values()]
    for group, _ in kept.values():
        group["params"] = [param for param in params if groups[param] is group]
    try:
        yield
    finally:
        for group, members in kept.values():
            group["params"] = members
        optimizer.param_groups = every


@contextmanager
def evaluated(parts: Parts) -> Iterator[None]:
    """Schedule-free optimizers hold two sets of weights: the averaged ones for a while, then the trained ones, bit for bit."""
    optimizer = parts.optimizer
    if not (callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))):
        yield
        return
    kept = {name: param.detach().clone() for name, param in parts.trained.params.items()}
    optimizer.eval()  # type: ignore[attr-defined]  # tested above
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]  # tested above
        with torch.no_grad():
            for name, param in parts.trained.params.items():
                param.copy_(kept[name])
