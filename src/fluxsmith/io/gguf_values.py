"""What the values of GGUF's quantised forms stand for. The usual forms here; the rest by the `gguf` package, an optional door
(pip install fluxsmith[gguf]). `dequantised(data, "Q4_K", (3072, 256))` -> fp32.

Blocks as llama.cpp lays them out: fp16 scales, then codes; K forms have 256 weights in 8 or 16 groups with scales of their own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fluxsmith.errors import ModelFileError
from fluxsmith.io.gguf_header import KINDS


def dequantised(data: Tensor, kind: str, shape: tuple[int, ...]) -> Tensor:
    """Stored bytes (uint8, any shape) -> fp32. Raises ModelFileError where a form needs the package and it is missing or too old."""
    size = next(size for name, _, size in KINDS.values() if name == kind)
    blocks = data.reshape(-1, size)
    return (FORMS[kind](blocks) if kind in FORMS else _by_package(blocks, kind)).reshape(shape)


def _half(blocks: Tensor, start: int) -> Tensor:
    """An fp16 number of each block, (B, 1) fp32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _halves(codes: Tensor, run: int) -> Tensor:
    """4-bit codes (B, n): the low halves of each run of bytes, then its high halves -> (B, 2n / run, run)."""
    runs = codes.unflatten(1, (-1, 1, run))
    return torch.cat((runs & 15, runs >> 4), dim=2).flatten(1, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_halves(blocks[:, 2:], 16).flatten(1).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _halves(blocks[:, 4:], 16).flatten(1).float() + _half(blocks, 2)


def _fifth(blocks: Tensor, start: int) -> Tensor:
    """The highest bits of 32 codes, (B, 32), in place."""
    bits = blocks[:, start : start + 4, None] >> torch.arange(8, dtype=torch.uint8)
    return (bits & 1).flatten(1) << 4


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * ((_halves(blocks[:, 6:], 16).flatten(1) | _fifth(blocks, 2)).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_halves(blocks[:, 8:], 16).flatten(1) | _fifth(blocks, 4)).float() + _half(blocks, 2)


def _groups(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset of the 8 groups of a K block, (B, 8, 1) each: 6-bit numbers packed in 12 bytes, times fp16 ones."""
    low, high, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((low & 63, (rest & 15) | ((low >> 2) & 48)), dim=1)
    offsets = torch.cat((high & 63, (rest >> 4) | ((high >> 2) & 48)), dim=1)
    return (_half(blocks, 0) * scales.float())[..., None], (_half(blocks, 2) * offsets.float())[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    scale, offset = _groups(blocks)
    return scale * _halves(blocks[:, 16:], 32).float() - offset


def _q5_k(blocks: Tensor) -> Tensor:
    scale, offset = _groups(blocks)
    high = (blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1
    return scale * (_halves(blocks[:, 48:], 32) | (high << 4)).float() - offset


def _q6_k(blocks: Tensor) -> Tensor:
    low = _halves(blocks[:, :128], 64).unflatten(2, (2, 32)).flatten(1, 2)
    pairs = blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    codes = (low | ((pairs & 3) << 4).flatten(1, 2)).float() - 32
    scales = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return scales[..., None] * codes.flatten(1).unflatten(1, (16, 16))


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def _by_package(blocks: Tensor, kind: str) -> Tensor:
    try:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise ModelFileError(f"weights in {kind} need the gguf package", why=str(error), fix="pip install gguf") from error
    try:
        return torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType[kind]))
    except (NotImplementedError, KeyError) as error:
        fix = "pip install --upgrade gguf, or get the file in another form"
        raise ModelFileError(f"weights in {kind} are not known to the gguf package", why=str(error)[:200], fix=fix) from error
