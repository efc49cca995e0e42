"""Decompositions: exact and randomised agree, and ranks are chosen by what they hold."""

import pytest
import torch

from fluxsmith.tools.low_rank import Ranks, residual_energy, svd_of, svd_of_product, weighted_left


def decaying(rows: int, columns: int, power: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix with singular values 1 / k^power, and the values."""
    generator = torch.Generator().manual_seed(0)
    side = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, side, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, side, generator=generator)).Q
    values = torch.arange(1, side + 1).float() ** -power
    return (left * values) @ right.T, values


@pytest.mark.ledger("KS-45")
@pytest.mark.parametrize("power", [1.0, 0.3])
def test_randomised_is_as_good_as_exact(power: float) -> None:
    """Within 1 % of the nearest matrix of rank 24, even for a flat spectrum."""
    matrix, values = decaying(900, 700, power)
    found = svd_of(matrix, Ranks(number=24))
    assert found.values.shape == (24,)
    best = float(values[24:].square().sum())
    assert residual_energy(matrix, *weighted_left(found)) <= best * 1.01
    assert torch.equal(found.left, svd_of(matrix, Ranks(number=24)).left)
    assert not torch.equal(found.left, svd_of(matrix, Ranks(number=24), seed=1).left)


def test_wide_matrices_by_energy_and_ratio() -> None:
    matrix, values = decaying(900, 700, 1.0)
    share = values.square().cumsum(0) / values.square().sum()
    assert len(svd_of(matrix, Ranks(energy=0.95)).values) == int((share < 0.95).sum()) + 1
    assert len(svd_of(matrix, Ranks(energy=0.995)).values) == int((share < 0.995).sum()) + 1  # needs more than the first guess
    assert len(svd_of(matrix, Ranks(ratio=10.5)).values) == 10
    assert len(svd_of(matrix, Ranks(ratio=200.5)).values) == 200
    assert len(svd_of(matrix, Ranks(energy=0.995, limit=20)).values) == 20
    assert len(svd_of(matrix, Ranks(number=2000)).values) == 700


def test_a_product_is_decomposed_through_its_factors() -> None:
    up, down = torch.randn(60, 5), torch.randn(5, 40)
    found = svd_of_product(up, down)
    assert torch.allclose(found.values, torch.linalg.svdvals(up @ down)[:5], rtol=1e-4)
    assert torch.allclose((found.left * found.values) @ found.right, up @ down, atol=1e-4)
    assert svd_of_product(torch.randn(3, 5), torch.randn(5, 40)).values.shape == (3,)
