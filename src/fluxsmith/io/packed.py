"""Weights in few bits as tensors: packing, unpacking, and what they stand for. Plain PyTorch, any device.

Rows: 8-bit values (out, in) times one scale an output row. Groups (int4, int2): `code * scale + offset`, one pair for each `group` inputs.
NF4 (Dettmers et al. 2023): 16 quantiles of the normal distribution times the largest value of each 64 weights, itself stored in 8 bits.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fluxsmith.io.forms import NF4_BLOCK, NF4_NESTED

FP8 = torch.float8_e4m3fn
LARGEST_FP8, LARGEST_INT8 = 448.0, 127.0
TINY = 1e-12  # least scale, so that rows of zeros stay zero
SHRINKS = (1.0, 0.93, 0.86, 0.8, 0.73, 0.66)  # ranges tried for a group, as part of its full range
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def fp8_rows(weight: Tensor, *, rows: bool = True) -> dict[str, Tensor]:
    """(out, in) -> values as e4m3 and scale (out, 1) fp32; `rows` False: a plain cast."""
    scale = row_scale(weight, LARGEST_FP8) if rows else weight.new_ones(weight.shape[0], 1)
    return {"": (weight / scale).clamp(-LARGEST_FP8, LARGEST_FP8).to(FP8), "scale": scale}


def int8_rows(weight: Tensor) -> dict[str, Tensor]:
    """(out, in) -> values as int8 and scale (out, 1) fp32, symmetric."""
    scale = row_scale(weight, LARGEST_INT8)
    return {"": (weight / scale).round_().clamp_(-LARGEST_INT8, LARGEST_INT8).to(torch.int8), "scale": scale}


def row_scale(x: Tensor, largest: float) -> Tensor:
    """The largest size in each row of the last axis / `largest`: (..., n) -> (..., 1) fp32."""
    return (x.abs().amax(dim=-1, keepdim=True).float() / largest).clamp(min=TINY)


def grouped(weight: Tensor, bits: int, group: int, *, symmetric: bool = False) -> dict[str, Tensor]:
    """(out, in) fp32 -> packed codes (out, in * bits / 8) uint8, scale and offset (out, in / group) bf16.

    Of several ranges the one with the least squared error is taken for each group.
    """
    cut = weight.unflatten(1, (-1, group))
    low, high = cut.amin(dim=2, keepdim=True), cut.amax(dim=2, keepdim=True)
    if symmetric:
        high = torch.maximum(low.abs(), high.abs())
        low = -high
    best = scale = offset = codes = None
    for shrink in SHRINKS:
        step = ((high - low) * shrink / (2**bits - 1)).clamp(min=TINY).bfloat16().float()
        start = ((high + low) / 2 - step * (2**bits - 1) / 2).bfloat16().float()
        tried = ((cut - start) / step).round_().clamp_(0, 2**bits - 1)
        error = (tried * step + start - cut).square_().sum(dim=2, keepdim=True)
        if best is None or scale is None or offset is None or codes is None:
            best, scale, offset, codes = error, step, start, tried
        else:
            better = error < best
            best = torch.where(better, error, best)
            scale, offset, codes = (torch.where(better, new, old) for new, old in ((step, scale), (start, offset), (tried, codes)))
    if scale is None or offset is None or codes is None:
        raise ValueError("no range was tried")
    return {"": pack(codes.flatten(1).to(torch.uint8), bits), "scale": scale[..., 0].bfloat16(), "offset": offset[..., 0].bfloat16()}


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (r, c) uint8 -> (r, c * bits / 8); the first code is in the highest bits."""
    per = 8 // bits
    parts = codes.unflatten(1, (-1, per))
    packed = parts[..., 0]
    for place in range(1, per):
        packed = (packed << bits) | parts[..., place]
    return packed.contiguous()


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The reverse of `pack`, uint8."""
    shifts = range(8 - bits, -1, -bits)
    return torch.stack([(packed >> shift) & (2**bits - 1) for shift in shifts], dim=-1).flatten(1)


def from_groups(packed: Tensor, scale: Tensor, offset: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """What the codes stand for, (out, in); computed in fp32, or in bf16 where that is asked for."""
    inner = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    codes = unpack(packed.view(torch.uint8), bits).to(inner).unflatten(1, (scale.shape[1], -1))
    return torch.addcmul(offset.to(inner)[..., None], codes, scale.to(inner)[..., None]).flatten(1).to(dtype)


def nf4(weight: Tensor) -> dict[str, Tensor]:
    """(out, in) fp32, in even -> packed (out, in / 2) uint8 and its doubly quantised largest values: absmax, nested, offset."""
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    parts = _nested(blocks.abs().amax(dim=1))
    largest = nf4_absmax(parts["absmax"], parts["nested"], parts["offset"]).clamp(min=TINY)
    values = torch.tensor(NF4_VALUES, device=weight.device)
    codes = torch.bucketize(blocks / largest[:, None], (values[1:] + values[:-1]) / 2)
    return {"": pack(codes.flatten()[: flat.numel()].view(weight.shape).to(torch.uint8), 4), **parts}


def _nested(absmax: Tensor) -> dict[str, Tensor]:
    """Largest values less their mean, 256 at a time, in 8 bits."""
    offset = absmax.mean()
    rows = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % NF4_NESTED)).view(-1, NF4_NESTED)
    scale = row_scale(rows, LARGEST_INT8)
    codes = (rows / scale).round().clamp(-LARGEST_INT8, LARGEST_INT8).to(torch.int8)
    return {"absmax": codes.flatten()[: absmax.numel()], "nested": scale.flatten(), "offset": offset.view(1)}


def nf4_absmax(absmax: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """The largest value of each block, fp32."""
    return absmax.float() * nested.float().repeat_interleave(NF4_NESTED)[: absmax.numel()] + offset


def from_nf4(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """What the codes stand for, (out, in), with `absmax` as `nf4_absmax` gives it. Two weights are looked up at once."""
    values = torch.tensor(NF4_VALUES, device=packed.device)
    pairs = torch.stack((values[:, None].expand(16, 16), values[None].expand(16, 16)), dim=-1).view(256, 2)
    found = pairs[packed.view(torch.uint8).int()].flatten()
    padded = torch.nn.functional.pad(found, (0, -found.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK) * absmax[:, None]
    return padded.flatten()[: found.numel()].view(packed.shape[0], -1).to(dtype)


def scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """`weight` (out, in) times a scale for the tensor, for each row, or for blocks of a row's inputs (out, blocks, 1)."""
    if scale.numel() == 1:
        return weight * scale.flatten()
    if scale.dim() == 3:
        return (weight.view(weight.shape[0], scale.shape[1], -1) * scale).view(weight.shape)
    return weight * scale.view(-1, *[1] * (weight.dim() - 1))


def stood_for(form: str, parts: Mapping[str, Tensor]) -> Tensor:
    """The weight of any stored form (io/forms.py), fp32."""
    if form == "scaled":
        return scaled(parts[""].float(), parts["scale"].float())
    if form == "nf4":
        return from_nf4(parts[""], nf4_absmax(parts["absmax"], parts["nested"], parts["offset"]), torch.float32)
    return from_groups(parts[""], parts["scale"], parts["offset"], {"int4": 4, "int2": 2}[form], torch.float32)
