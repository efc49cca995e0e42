"""What the orthogonal kinds share: Cayley's rotations from unconstrained blocks, and blocks that turn rows.

`cayley(blocks)` (k, b, b) are rotations R = (I + Q) (I - Q)^-1 with Q = A - A^T; at zero they are the identity.
"""

import torch
from torch import Tensor


def skew(blocks: Tensor) -> Tensor:
    """A - A^T in float32."""
    blocks = blocks.float()
    return blocks - blocks.transpose(-1, -2)


def cayley(skewed: Tensor) -> Tensor:
    """(..., b, b) skew-symmetric, float32 -> rotations."""
    eye = torch.eye(skewed.shape[-1], device=skewed.device)
    with torch.autocast(skewed.device.type, enabled=False):
        return torch.linalg.solve(eye - skewed, eye + skewed)


def turn(rotations: Tensor, rows: Tensor) -> Tensor:
    """R^T on each block of the last axis: rotations (k, b, b), rows (..., k * b) -> the same shape, in the type of rows."""
    parts = rows.unflatten(-1, rotations.shape[:2])
    return torch.einsum("knm,...kn->...km", rotations.to(rows.dtype), parts).flatten(-2)
