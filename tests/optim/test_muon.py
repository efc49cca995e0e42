"""Muon: singular values near one, the published update for matrices, AdamW for the rest."""

import pytest
import torch
from torch import nn

from fluxsmith.optim.groups import Group
from fluxsmith.optim.muon import COEFFICIENTS, Config, orthogonalise


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8), (1, 5)])
def test_singular_values_are_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalise(matrix, 5))
    if shape == (16, 16):  # the smallest ones of a square matrix need more steps
        values = torch.linalg.svdvals(orthogonalise(matrix, 10))
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_directions_are_kept() -> None:
    """U S V^T becomes about U V^T: the same singular vectors."""
    matrix = torch.randn(6, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonalise(matrix, 5) @ v.T
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), rtol=0, atol=1e-6)
    assert inner.diagonal().min() > 0.6


def test_one_step_by_the_formula() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    param = nn.Parameter(weight.clone())
    optimizer = Config(type="muon", lr=0.02, momentum=0.9, weight_decay=0.1).build([Group("all", (param,))])
    param.grad = gradient.clone()
    optimizer.step()
    momentum = 0.1 * gradient
    x = 0.1 * gradient + 0.9 * momentum  # Nesterov
    x = x / (x.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    torch.testing.assert_close(param.detach(), weight * (1 - 0.02 * 0.1) - 0.02 * 0.2 * 6**0.5 * x)


def test_kernels_are_flattened() -> None:
    kernel = nn.Parameter(torch.zeros(4, 3, 2, 2))
    optimizer = Config(type="muon", lr=1.0).build([Group("all", (kernel,))])
    kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(5))
    optimizer.step()
    values = torch.linalg.svdvals(kernel.detach().flatten(1) / (0.2 * 12**0.5))
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_one_axis_is_adamw() -> None:
    bias, reference = nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(7))
    optimizer = Config(type="muon", lr=0.01, betas=(0.9, 0.95)).build([Group("all", (bias,))])
    torch_optimizer = torch.optim.AdamW([reference], lr=0.01, betas=(0.9, 0.95), weight_decay=0)
    for step in range(8):
        gradient = torch.randn(7, generator=torch.Generator().manual_seed(step))
        bias.grad, reference.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        torch_optimizer.step()
    torch.testing.assert_close(bias, reference, rtol=0, atol=1e-6)
