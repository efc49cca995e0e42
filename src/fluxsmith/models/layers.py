"""Small layers of the FLUX transformer, in the checkpoint's own names (black-forest-labs/flux)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxsmith.models.attention import rotary_table
from fluxsmith.models.linear import Linear


def timestep_embedding(t: Tensor, dim: int, *, max_period: float = 10_000.0, factor: float = 1000.0) -> Tensor:
    """Sinusoids of factor * t, cosines first: (B,) in [0, 1] -> (B, dim) in the type of t."""
    half = dim // 2
    rate = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = (factor * t).float()[:, None] * rate[None]
    return torch.cat((angle.cos(), angle.sin()), dim=-1).to(t.dtype if t.is_floating_point() else torch.float32)


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear: scalars and pooled text into the conditioning vector."""

    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = Linear(in_dim, hidden)
        self.out_layer = Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim) -> (B, hidden)."""
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in fp32 (Zhang & Sennrich 2019), eps 1e-6."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and type as x."""
        return F.rms_norm(x.float(), (x.shape[-1],), eps=1e-6).type_as(x) * self.scale.type_as(x)


class QKNorm(nn.Module):
    """RMS norm of queries and keys, per head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, N, D) each, normed."""
        return self.query_norm(q), self.key_norm(k)


class SelfAttention(nn.Module):
    """The weights of one stream's attention: fused qkv, head norms, output projection."""

    def __init__(self, hidden: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.qkv = Linear(hidden, hidden * 3, bias=qkv_bias)
        self.norm = QKNorm(hidden // num_heads)
        self.proj = Linear(hidden, hidden)


class ModulationOut(NamedTuple):
    """Shift, scale and gate of one sub-layer, (B, 1, D) each."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulation(nn.Module):
    """adaLN-zero (Peebles & Xie 2023): `lin(silu(vec))` cut into one or two triples."""

    def __init__(self, hidden: int, *, double: bool) -> None:
        super().__init__()
        self.parts = 2 if double else 1
        self.lin = Linear(hidden, self.parts * 3 * hidden)

    def forward(self, vec: Tensor) -> tuple[ModulationOut, ...]:
        """(B, D) -> `parts` triples."""
        chunks = self.lin(F.silu(vec))[:, None].chunk(3 * self.parts, dim=-1)
        return tuple(ModulationOut(*chunks[3 * i : 3 * i + 3]) for i in range(self.parts))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then (1 + scale) x + shift: (B, N, D) with (B, 1, D)."""
    return (1 + scale) * F.layer_norm(x, (x.shape[-1],), eps=1e-6) + shift


class LastLayer(nn.Module):
    """Modulated norm and the projection back to packed latents."""

    def __init__(self, hidden: int, out_channels: int) -> None:
        super().__init__()
        self.linear = Linear(hidden, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """(B, N, D), (B, D) -> (B, N, out_channels)."""
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


def rotary_positions(ids: Tensor, axes_dim: tuple[int, ...], theta: float) -> Tensor:
    """Rotary table of three-axis position ids: (B, N, 3) -> (B, 1, N, head/2, 2)."""
    return torch.cat([rotary_table(ids[..., axis], dim, theta) for axis, dim in enumerate(axes_dim)], dim=-2)[:, None]
