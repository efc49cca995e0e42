"""From elements to the number that is minimised: masks by their own area, weights, mean over the batch."""

import torch

from fluxsmith.train.step import reduce_loss

ELEMENTS = torch.rand(3, 16, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ONES = torch.ones(3, dtype=torch.float64)
SIGMA = torch.rand(3)


def test_without_a_mask_it_is_the_mean() -> None:
    loss = reduce_loss(ELEMENTS, sigma=SIGMA, weight=None, sample_weight=ONES)
    torch.testing.assert_close(loss.total, ELEMENTS.mean())
    torch.testing.assert_close(loss.per_sample, ELEMENTS.mean(dim=(1, 2, 3)))
    assert torch.equal(loss.sigma, SIGMA)


def test_a_mask_counts_only_its_area() -> None:
    mask = torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    mask[0, :, :2], mask[1, :, 0, 0], mask[2] = 1, 1, 0.5
    loss = reduce_loss(ELEMENTS, sigma=SIGMA, weight=None, sample_weight=ONES, mask=mask)
    expected = torch.stack((ELEMENTS[0, :, :2].mean(), ELEMENTS[1, :, 0, 0].mean(), ELEMENTS[2].mean()))
    torch.testing.assert_close(loss.per_sample, expected)


def test_a_full_mask_changes_nothing_and_an_empty_one_gives_zero() -> None:
    full = reduce_loss(ELEMENTS, sigma=SIGMA, weight=None, sample_weight=ONES, mask=torch.ones(3, 1, 4, 4))
    torch.testing.assert_close(full.total, ELEMENTS.mean())
    empty = reduce_loss(ELEMENTS, sigma=SIGMA, weight=None, sample_weight=ONES, mask=torch.zeros(3, 1, 4, 4))
    assert empty.total == 0


def test_weights_multiply_and_are_not_renormalised() -> None:
    weight, sample_weight = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([0.5, 1.0, 1.0]).double()
    loss = reduce_loss(ELEMENTS, sigma=SIGMA, weight=weight, sample_weight=sample_weight)
    torch.testing.assert_close(loss.per_sample, ELEMENTS.mean(dim=(1, 2, 3)) * weight * sample_weight)
    torch.testing.assert_close(loss.total, loss.per_sample.mean())


def test_only_the_total_has_a_gradient() -> None:
    elements = ELEMENTS.clone().requires_grad_()
    loss = reduce_loss(elements, sigma=SIGMA, weight=None, sample_weight=ONES)
    assert loss.total.requires_grad
    assert not loss.per_sample.requires_grad
    loss.total.backward()
    torch.testing.assert_close(elements.grad, torch.full_like(elements, 1 / elements.numel()))
