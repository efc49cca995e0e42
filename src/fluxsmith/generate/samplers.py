"""Integrators of the flow: functions (velocity, x, sigmas, callback) -> x.

`velocity(x, sigma)` is the model's prediction noise - clean at noise level sigma (a float).
"""

from collections.abc import Callable

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]  # step, x after the step, estimate of the clean picture


def euler(velocity: Velocity, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """x += (sigma_next - sigma) v; one model call a step. x: (B, N, C) in fp32."""
    levels = sigmas.tolist()
    for step, (now, after) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        v = velocity(x, now)
        clean = x - now * v if callback else x
        x = x + (after - now) * v
        if callback:
            callback(step, x, clean)
    return x


def heun(velocity: Velocity, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Heun's second-order method: two model calls a step, one for the last."""
    levels = sigmas.tolist()
    for step, (now, after) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        v = velocity(x, now)
        clean = x - now * v if callback else x
        if after > 0:
            v = (v + velocity(x + (after - now) * v, after)) / 2
        x = x + (after - now) * v
        if callback:
            callback(step, x, clean)
    return x


SAMPLERS = {"euler": euler, "heun": heun}
