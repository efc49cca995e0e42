"""True guidance: the formula, and what it costs."""

import torch
from torch import Tensor

from fluxsmith.generate.guidance import guided


class Constant:
    """A velocity that counts its calls."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.calls = 0

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        self.calls += 1
        return torch.full_like(x, self.value)


X = torch.zeros(1, 2, 3, 3)


def test_the_formula() -> None:
    positive, negative = Constant(3.0), Constant(1.0)
    assert guided(positive, negative, 2.5)(X, 0.5).eq(1 + 2.5 * (3 - 1)).all()
    assert guided(positive, negative, 0.0)(X, 0.5).eq(1).all()
    assert (positive.calls, negative.calls) == (2, 2)


def test_scale_1_is_one_call() -> None:
    positive, negative = Constant(3.0), Constant(1.0)
    assert guided(positive, negative, 1.0)(X, 0.5).eq(3).all()
    assert guided(positive, None, 7.0)(X, 0.5).eq(3).all()
    assert (positive.calls, negative.calls) == (2, 0)


def test_a_scale_may_depend_on_the_noise_level() -> None:
    positive, negative = Constant(3.0), Constant(1.0)
    velocity = guided(positive, negative, lambda sigma: 4.0 if sigma > 0.5 else 1.0)
    assert velocity(X, 0.9).eq(9).all()
    assert velocity(X, 0.1).eq(3).all()
    assert negative.calls == 1
