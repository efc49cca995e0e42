"""What one step computes: a Loss, and the reduction from elements to the number that is minimised."""

from typing import NamedTuple

from torch import Tensor


class Loss(NamedTuple):
    """The scalar to minimise, and what it is made of (detached)."""

    total: Tensor  # 0-dim, with gradient
    per_sample: Tensor  # (B,)
    sigma: Tensor  # (B,) noise levels; empty for objectives without them


def reduce_loss(elements: Tensor, *, sigma: Tensor, weight: Tensor | None, sample_weight: Tensor, mask: Tensor | None = None) -> Loss:
    """Elements (B, C, h, w) -> mean per sample (over the mask, if any), times weights (B,), mean over the batch.

    A mask (B, 1, h, w) is normalised by its own sum, so that a small mask does not weaken the step.
    """
    if mask is None:
        per_sample = elements.flatten(1).mean(dim=1)
    else:
        area = mask.expand_as(elements).flatten(1).sum(dim=1).clamp(min=1e-6)
        per_sample = (elements * mask).flatten(1).sum(dim=1) / area
    if weight is not None:
        per_sample = per_sample * weight
    per_sample = per_sample * sample_weight
    return Loss(per_sample.mean(), per_sample.detach(), sigma)
