"""What the kernels of this folder share on the host: the launch, block sizes, types that they take."""

from typing import Any

import torch
from torch import Tensor

KINDS = (torch.float32, torch.bfloat16, torch.float16)


def readable(tensor: Tensor) -> Tensor:
    """The tensor, copied only where its channels do not lie side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def checked(**tensors: Tensor) -> None:
    """Raises TypeError for a type that the kernels, which compute in fp32, would make worse or cannot read."""
    for name, tensor in tensors.items():
        if tensor.dtype not in KINDS:
            raise TypeError(f"{name} is {tensor.dtype}; the kernels take {', '.join(map(str, KINDS))}")


def block_of(width: int) -> int:
    """The smallest power of two that holds a row."""
    return 1 << (width - 1).bit_length()


def parts_of(count: int, size: int) -> int:
    """Programs that `count` rows or heads need where each takes `size`."""
    return -(-count // size)


def warps_of(elements: int) -> int:
    """Warps for one program: about 16 elements a thread, 1 to 16 warps."""
    return min(16, max(1, block_of(elements) // 512))


def launch(kernel: Any, grid: tuple[int, ...], *operands: Any, on: Tensor, warps: int) -> None:
    """Starts a kernel on the device of `on`. An operand is a tensor, or a tuple of one and the strides (in elements) needed."""
    with torch.cuda.device_of(on):
        kernel[grid](*operands, num_warps=warps)
