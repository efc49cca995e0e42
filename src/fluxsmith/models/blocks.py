"""The two kinds of FLUX block; one signature: block(img, txt, vec, pe, mask, ip) -> (img, txt).

Text comes before image in the joint sequence, as in the reference implementation.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fluxsmith.models.attention import attention, split_heads
from fluxsmith.models.layers import Modulation, ModulationOut, QKNorm, SelfAttention
from fluxsmith.models.linear import Linear
from fluxsmith.models.ops import LEAN, Norm, Ops
from fluxsmith.models.stream import IpTokens

Mods = tuple[ModulationOut, ...]
Run = Callable[[nn.Module, Tensor], Mods]


def run_module(module: nn.Module, vec: Tensor) -> Mods:
    """The plain call."""
    return module(vec)


class Block(nn.Module):
    """What both kinds share: modulations from the conditioning vector, and one signature."""

    def modulations(self, vec: Tensor, run: Run = run_module) -> Mods:
        """All shifts, scales and gates from the conditioning vector: computed once, outside what is recomputed or compiled.

        `run(module, vec)` calls a modulation; whoever keeps its weights elsewhere brings them in.
        """
        raise NotImplementedError


class DoubleStreamBlock(Block):
    """Image and text have their own weights and meet in one attention."""

    def __init__(self, hidden: int, num_heads: int, mlp_hidden: int, *, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.ops: Ops = LEAN
        self.img_mod = Modulation(hidden, double=True)
        self.img_attn = SelfAttention(hidden, num_heads, qkv_bias)
        self.img_mlp = nn.Sequential(Linear(hidden, mlp_hidden), nn.GELU(approximate="tanh"), Linear(mlp_hidden, hidden))
        self.txt_mod = Modulation(hidden, double=True)
        self.txt_attn = SelfAttention(hidden, num_heads, qkv_bias)
        self.txt_mlp = nn.Sequential(Linear(hidden, mlp_hidden), nn.GELU(approximate="tanh"), Linear(mlp_hidden, hidden))

    def modulations(self, vec: Tensor, run: Run = run_module) -> Mods:
        """As Block.modulations."""
        return (*run(self.img_mod, vec), *run(self.txt_mod, vec))

    def forward(
        self, img: Tensor, txt: Tensor, mods: Mods, pe: Tensor, mask: Tensor | None, ip: tuple[IpTokens, ...]
    ) -> tuple[Tensor, Tensor]:
        """img (B, N, D), txt (B, T, D), mods from `modulations`, pe (B, 1, T+N, head/2, 2)."""
        ops, num_heads = self.ops, self.num_heads
        img_attn_mod, img_mlp_mod, txt_attn_mod, txt_mlp_mod = mods
        img_qkv = self.img_attn.qkv(ops.modulate(img, img_attn_mod.shift, img_attn_mod.scale))
        txt_qkv = self.txt_attn.qkv(ops.modulate(txt, txt_attn_mod.shift, txt_attn_mod.scale))
        norms = [_norm(txt, self.txt_attn.norm), _norm(img, self.img_attn.norm)]
        q, k, v = ops.heads(torch.cat((txt_qkv, img_qkv), dim=1), norms, pe, num_heads)
        txt_out, img_out = ops.attend(q, k, v, mask).split((txt.shape[1], img.shape[1]), dim=1)

        img_q = self.img_attn.norm.query_norm(split_heads(img_qkv, num_heads)[0]) if ip else img_qkv  # before rotation
        img_out = img_out + _ip(img_q, ip, after_block=False) if ip else img_out
        img = ops.gate(img, img_attn_mod.gate, self.img_attn.proj(img_out))
        img = ops.gate(img, img_mlp_mod.gate, self._mlp(self.img_mlp, img, img_mlp_mod))
        img = img + _ip(img_q, ip, after_block=True) if ip else img

        txt = ops.gate(txt, txt_attn_mod.gate, self.txt_attn.proj(txt_out))
        txt = ops.gate(txt, txt_mlp_mod.gate, self._mlp(self.txt_mlp, txt, txt_mlp_mod))
        return img, txt

    def _mlp(self, mlp: nn.Sequential, x: Tensor, mod: ModulationOut) -> Tensor:
        first, last = mlp[0], mlp[2]
        if not (isinstance(first, Linear) and isinstance(last, Linear)):
            raise TypeError("the MLP's layers are Linear")
        return self.ops.linear(last, (first(self.ops.modulate(x, mod.shift, mod.scale)),), (True,))[0]


class SingleStreamBlock(Block):
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
        self.ops: Ops = LEAN
        self.advances_text = True  # the last block of a model need not: nothing reads its text

    def modulations(self, vec: Tensor, run: Run = run_module) -> Mods:
        """As Block.modulations."""
        return run(self.modulation, vec)

    def forward(
        self, img: Tensor, txt: Tensor, mods: Mods, pe: Tensor, mask: Tensor | None, ip: tuple[IpTokens, ...]
    ) -> tuple[Tensor, Tensor]:
        """As DoubleStreamBlock."""
        ops, (mod,) = self.ops, mods
        x = torch.cat((txt, img), dim=1)
        qkv, mlp = ops.linear(self.linear1, (ops.modulate(x, mod.shift, mod.scale),), (False,), (3 * self.hidden, self.mlp_hidden))
        q, k, v = ops.heads(qkv, [_norm(x, self.norm)], pe, self.num_heads)
        length, rest = txt.shape[1], 0 if self.advances_text else txt.shape[1]
        q, mlp, x = (q[:, :, rest:], mlp[:, rest:], x[:, rest:]) if rest else (q, mlp, x)
        if rest and mask is not None and mask.shape[-2] > 1:
            mask = mask[..., rest:, :]
        out = ops.attend(q, k, v, mask)
        out = out + _ip(q, ip, after_block=False) if ip else out
        x = ops.gate(x, mod.gate, ops.linear(self.linear2, (out, mlp), (False, True))[0])
        if rest:
            return (x + _ip(q, ip, after_block=True) if ip else x), txt
        txt, img = x.split((length, img.shape[1]), dim=1)
        img = img + _ip(q[:, :, length:], ip, after_block=True) if ip else img
        return img, txt


def _norm(x: Tensor, norm: QKNorm) -> Norm:
    """The norms of q and k for the rows of one stream."""
    return x.shape[1], norm.query_norm.scale, norm.key_norm.scale


def _ip(q: Tensor, ip: tuple[IpTokens, ...], *, after_block: bool) -> Tensor | float:
    """Sum of scaled attention to extra keys and values at one of the two places, or 0."""
    chosen = [tokens for tokens in ip if tokens.after_block is after_block]
    return sum((tokens.scale * attention(q, tokens.key, tokens.value) for tokens in chosen), start=0.0)
