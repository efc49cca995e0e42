"""Latents <-> image tokens: 2x2 cells become one token, channel order (c, row, column), and its position ids."""

import torch
from torch import Tensor

PATCH = 2


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w), even sides -> tokens (B, h/2 * w/2, 4C)."""
    b, c, h, w = latents.shape
    if h % PATCH or w % PATCH:
        raise ValueError(f"latent sides must be even, got {h}x{w}")
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), c * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, N, 4C) -> latents (B, C, height, width), sides in latent cells."""
    b, _, c = tokens.shape
    grid = tokens.view(b, height // 2, width // 2, c // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, height, width)


def image_ids(batch: int, height: int, width: int, *, axis: float = 0.0, device: torch.device | str = "cpu") -> Tensor:
    """Position ids [axis, row, column] of the tokens of latents (height, width): (B, N, 3) fp32."""
    rows = torch.arange(height // 2, device=device, dtype=torch.float32)
    columns = torch.arange(width // 2, device=device, dtype=torch.float32)
    grid = torch.stack((torch.full((len(rows), len(columns)), axis, device=device), *torch.meshgrid(rows, columns, indexing="ij")), -1)
    return grid.flatten(0, 1).expand(batch, -1, -1)


def text_ids(batch: int, length: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Position ids of text tokens, all zero: (B, T, 3) fp32."""
    return torch.zeros(batch, length, 3, device=device)


def token_count(height: int, width: int) -> int:
    """Image tokens of latents (height, width)."""
    return (height // 2) * (width // 2)
