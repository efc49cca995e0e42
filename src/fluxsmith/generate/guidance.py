"""Classifier-free guidance around a model call: v = v_neg + scale * (v_pos - v_neg) (Ho & Salimans 2022).

The embedded guidance of FLUX.1-dev is a model input (Tokens.guidance) and needs nothing here.
"""

from collections.abc import Callable

from torch import Tensor

from fluxsmith.generate.samplers import Velocity


def guided(positive: Velocity, negative: Velocity | None, scale: float | Callable[[float], float]) -> Velocity:
    """A velocity under guidance; scale 1 (or no negative) costs one call. `scale` may depend on sigma."""

    def velocity(x: Tensor, sigma: float) -> Tensor:
        strength = scale(sigma) if callable(scale) else scale
        v = positive(x, sigma)
        if negative is None or strength == 1:
            return v
        v_neg = negative(x, sigma)
        return v_neg + strength * (v - v_neg)

    return velocity
