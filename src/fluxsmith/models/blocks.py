"""The two kinds of FLUX block; one signature: block(img, txt, vec, pe, mask, ip) -> (img, txt).

Text comes before image in the joint sequence, as in the reference implementation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxsmith.models.attention import attention, rotate, split_heads
from fluxsmith.models.layers import Modulation, QKNorm, SelfAttention, modulate
from fluxsmith.models.linear import Linear
from fluxsmith.models.stream import IpTokens


class DoubleStreamBlock(nn.Module):
    """Image and text have their own weights and meet in one attention."""

    def __init__(self, hidden: int, num_heads: int, mlp_hidden: int, *, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.img_mod = Modulation(hidden, double=True)
        self.img_attn = SelfAttention(hidden, num_heads, qkv_bias)
        self.img_mlp = nn.Sequential(Linear(hidden, mlp_hidden), nn.GELU(approximate="tanh"), Linear(mlp_hidden, hidden))
        self.txt_mod = Modulation(hidden, double=True)
        self.txt_attn = SelfAttention(hidden, num_heads, qkv_bias)
        self.txt_mlp = nn.Sequential(Linear(hidden, mlp_hidden), nn.GELU(approximate="tanh"), Linear(mlp_hidden, hidden))

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, mask: Tensor | None, ip: tuple[IpTokens, ...]
    ) -> tuple[Tensor, Tensor]:
        """img (B, N, D), txt (B, T, D), vec (B, D), pe (B, 1, T+N, head/2, 2)."""
        img_attn_mod, img_mlp_mod = self.img_mod(vec)
        txt_attn_mod, txt_mlp_mod = self.txt_mod(vec)
        img_q, img_k, img_v = split_heads(self.img_attn.qkv(modulate(img, img_attn_mod.shift, img_attn_mod.scale)), self.num_heads)
        txt_q, txt_k, txt_v = split_heads(self.txt_attn.qkv(modulate(txt, txt_attn_mod.shift, txt_attn_mod.scale)), self.num_heads)
        img_q, img_k = self.img_attn.norm(img_q, img_k)
        txt_q, txt_k = self.txt_attn.norm(txt_q, txt_k)

        q = rotate(torch.cat((txt_q, img_q), dim=2), pe)
        k = rotate(torch.cat((txt_k, img_k), dim=2), pe)
        v = torch.cat((txt_v, img_v), dim=2)
        txt_out, img_out = attention(q, k, v, mask).split((txt.shape[1], img.shape[1]), dim=1)

        img_out = img_out + _ip(img_q, ip, after_block=False) if ip else img_out
        img = img + img_attn_mod.gate * self.img_attn.proj(img_out)
        img = img + img_mlp_mod.gate * self.img_mlp(modulate(img, img_mlp_mod.shift, img_mlp_mod.scale))
        img = img + _ip(img_q, ip, after_block=True) if ip else img

        txt = txt + txt_attn_mod.gate * self.txt_attn.proj(txt_out)
        txt = txt + txt_mlp_mod.gate * self.txt_mlp(modulate(txt, txt_mlp_mod.shift, txt_mlp_mod.scale))
        return img, txt


class SingleStreamBlock(nn.Module):
    """One set of weights for the joint sequence; attention and MLP run in parallel (Dehghani et al. 2023)."""

    def __init__(self, hidden: int, num_heads: int, mlp_hidden: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.hidden = hidden
        self.mlp_hidden = mlp_hidden
        self.linear1 = Linear(hidden, hidden * 3 + mlp_hidden)
        self.linear2 = Linear(hidden + mlp_hidden, hidden)
        self.norm = QKNorm(hidden // num_heads)
        self.modulation = Modulation(hidden, double=False)

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, mask: Tensor | None, ip: tuple[IpTokens, ...]
    ) -> tuple[Tensor, Tensor]:
        """As DoubleStreamBlock."""
        x = torch.cat((txt, img), dim=1)
        (mod,) = self.modulation(vec)
        qkv, mlp = self.linear1(modulate(x, mod.shift, mod.scale)).split((3 * self.hidden, self.mlp_hidden), dim=-1)
        q, k, v = split_heads(qkv, self.num_heads)
        q, k = self.norm(q, k)
        q, k = rotate(q, pe), rotate(k, pe)
        out = attention(q, k, v, mask)
        out = out + _ip(q, ip, after_block=False) if ip else out
        x = x + mod.gate * self.linear2(torch.cat((out, F.gelu(mlp, approximate="tanh")), dim=-1))
        length = txt.shape[1]
        txt, img = x.split((length, img.shape[1]), dim=1)
        img = img + _ip(q[:, :, length:], ip, after_block=True) if ip else img
        return img, txt


def _ip(q: Tensor, ip: tuple[IpTokens, ...], *, after_block: bool) -> Tensor | float:
    """Sum of scaled attention to extra keys and values at one of the two places, or 0."""
    chosen = [tokens for tokens in ip if tokens.after_block is after_block]
    return sum((tokens.scale * attention(q, tokens.key, tokens.value) for tokens in chosen), start=0.0)
