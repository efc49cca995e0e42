"""Mixed precision: autocast, loss scaling for fp16, and clipping that works with both."""

import math
import resource
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolved(name: str, device: torch.device) -> str:
    """`auto` is bf16 on a card, and no autocast on the CPU."""
    return ("no" if device.type == "cpu" else "bf16") if name == "auto" else name


class Scaler(torch.amp.GradScaler):
    """torch's, which also unscales gradients that are fp16 themselves: their small values are kept by the scale, not by their type."""

    def _unscale_grads_(self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> Any:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


class Precision:
    """`auto`, `no`, `bf16`, or `fp16` with a gradient scaler."""

    def __init__(self, name: str, device: torch.device) -> None:
        name = resolved(name, device)
        self.dtype = AUTOCAST.get(name)
        self.device = device
        self.scaler = Scaler(device.type) if name == "fp16" else None

    def autocast(self) -> AbstractContextManager[Any]:
        """Context of the forward pass."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Backward of the (scaled) loss."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def clip(
        self,
        optimizer: torch.optim.Optimizer,
        params: Iterable[nn.Parameter],
        max_norm: float,
        *,
        norm: Callable[[], Tensor] | None = None,
    ) -> float:
        """Clip the global norm (0: only measure it), which `norm` measures; returns the norm before clipping."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        params = list(params)
        total = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]) if norm is None else norm()
        torch.nn.utils.clip_grads_with_norm_(params, max_norm or float("inf"), total)
        return float(total)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer step."""
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    def skip(self) -> None:
        """A step that is not taken: the scaler still learns that its scale was too large."""
        if self.scaler is not None:
            self.scaler.update()

    def forgives(self, loss: float) -> bool:
        """With fp16 an overflowing gradient under a finite loss is the scaler's business, until its scale cannot be the cause."""
        return self.scaler is not None and math.isfinite(loss) and self.scaler.get_scale() >= 1

    def state(self) -> dict[str, float] | None:
        """The scaler's state, or None."""
        return None if self.scaler is None else self.scaler.state_dict()

    def restore(self, state: dict[str, float] | None) -> None:
        """Put the scaler's state back."""
        if self.scaler is not None and state is not None:
            self.scaler.load_state_dict(state)


def peak_bytes(device: torch.device) -> int:
    """Most device memory allocated so far; on the CPU the most memory this process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
