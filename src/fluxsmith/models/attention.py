"""attention(q, k, v): the one place where queries meet keys, and the rotary embedding that prepares them.

Rotary tables are cosines and sines in fp32, one pair for two channels (Su et al. 2021; FLUX uses three axes).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention over heads: q (B, H, N, D), k and v (B, H, M, D) -> (B, N, H*D).

    `mask` is boolean and broadcasts to (B, H, N, M); True means "may attend".
    """
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return x.transpose(1, 2).flatten(2)


def rotary_table(positions: Tensor, dim: int, theta: float) -> Tensor:
    """Cosine and sine of position * theta^(-2i/dim): (B, N) -> (B, N, dim/2, 2), angles in fp64, result fp32."""
    if dim % 2:
        raise ValueError(f"a rotary axis needs an even width, got {dim}")
    rate = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
    angle = positions.double()[..., None] * rate
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn channel pairs of x (B, H, N, D) by the table (B, 1, N, D/2, 2), in fp32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3*H*D) -> three of (B, H, N, D); the fused layout is [q | k | v], heads inside."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v
