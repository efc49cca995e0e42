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


def less_one(rotations: Tensor) -> Tensor:
    """R - 1: what a rotation adds, which 16-bit types can tell from 0 though not R from 1."""
    return rotations - torch.eye(rotations.shape[-1], device=rotations.device)


def turn(rotations: Tensor, rows: Tensor) -> Tensor:
    """R^T, or what it adds, on each block of the last axis: rotations (k, b, b), rows (..., k * b) -> the shape and type of rows."""
    parts = rows.unflatten(-1, rotations.shape[:2])
    return torch.einsum("knm,...kn->...km", rotations.to(rows.dtype), parts).flatten(-2)
