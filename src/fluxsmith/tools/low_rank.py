"""The best low-rank factors of a matrix, or of a product of factors: exact where that is cheap, else by a randomised range finder.

`svd_of(delta, Ranks(number=32))` (Halko, Martinsson, Tropp 2011, with power iterations); the same seed gives the same factors.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

EXACT_SIDE = 512  # matrices no wider than this are decomposed whole
OVERSAMPLING, POWER_STEPS = 16, 4
NEAR_FULL = 0.4  # share of the full rank from which the whole decomposition costs no more


@dataclass(frozen=True)
class Ranks:
    """How many singular values to keep: a number, or by their sizes, with a limit."""

    number: int | None = None
    energy: float | None = None
    """Smallest rank that holds this share of the squared singular values."""
    ratio: float | None = None
    """Values above the largest one / ratio."""
    limit: int | None = None
    """At most so many."""

    def count(self, values: Tensor, total: float) -> int | None:
        """How many of these leading values to keep, at least 1; None if more of them are needed to tell. `total`: all squared."""
        if self.number is not None:
            wanted: int | None = self.number
        elif self.energy is not None:
            reached = (values.double().square().cumsum(0) >= self.energy * total * (1 - 1e-6)).nonzero()
            wanted = int(reached[0]) + 1 if len(reached) else None
        else:
            above = int((values > values[0] / (self.ratio or 1.0)).sum())
            wanted = above if above < len(values) else None
        if self.limit is not None and (wanted is None and len(values) >= self.limit or (wanted or 0) > self.limit):
            return self.limit
        return None if wanted is None or wanted > len(values) else max(wanted, 1)


class Svd(NamedTuple):
    """Leading part of a decomposition: left (m, k), values (k,) descending, right (k, n)."""

    left: Tensor
    values: Tensor
    right: Tensor

    def first(self, count: int) -> "Svd":
        """The leading `count`."""
        return Svd(self.left[:, :count], self.values[:count], self.right[:count])


@torch.no_grad()
def svd_of(matrix: Tensor, ranks: Ranks, *, seed: int = 0) -> Svd:
    """The kept part of the decomposition of an (m, n) float32 matrix, on its device."""
    full = min(matrix.shape)
    total = (
        float(matrix.double().square().sum()) if full <= EXACT_SIDE else float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    )
    tried = ranks.number or min(64, ranks.limit or 64)
    while True:
        width = tried + OVERSAMPLING
        is_exact = full <= EXACT_SIDE or width >= NEAR_FULL * full
        found = _exact(matrix) if is_exact else _randomised(matrix, width, seed)
        trusted = found if is_exact else found.first(tried)
        count = ranks.count(trusted.values, total)
        if count is not None or is_exact:
            return found.first(min(count or full, full))
        tried *= 2


def _exact(matrix: Tensor) -> Svd:
    return Svd(*torch.linalg.svd(matrix, full_matrices=False))


def _randomised(matrix: Tensor, width: int, seed: int) -> Svd:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device, matrix.dtype)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(POWER_STEPS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return Svd(basis @ left, values, right)


@torch.no_grad()
def svd_of_product(up: Tensor, down: Tensor) -> Svd:
    """Exact decomposition of up (m, r) @ down (r, n) without ever making the product: all of its min(m, n, r) values."""
    left, left_r = torch.linalg.qr(up.double())
    right, right_r = torch.linalg.qr(down.double().T)
    inner = torch.linalg.svd(left_r @ right_r.T, full_matrices=False)
    return Svd((left @ inner.U).float(), inner.S.float(), (inner.Vh @ right.T).float())


def weighted_left(found: Svd) -> tuple[Tensor, Tensor]:
    """up, down with all of the values in up, as sd-scripts writes them."""
    return found.left * found.values, found.right


@torch.no_grad()
def residual_energy(matrix: Tensor, up: Tensor, down: Tensor, *, rows: int = 4096) -> float:
    """Squared Frobenius norm of matrix - up @ down, a few rows at a time."""
    up, down = up.to(matrix), down.to(matrix)
    parts = (
        (matrix[start : start + rows] - up[start : start + rows] @ down).square().sum(dtype=torch.float64)
        for start in range(0, len(matrix), rows)
    )
    return float(sum(parts))
