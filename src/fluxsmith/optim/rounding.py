"""Stochastic rounding of fp32 results to bf16 weights, so that steps below bf16's resolution act on average.

Zamirai et al. 2020: the low 16 bits of the fp32 value become the chance of rounding up, so the expected weight is the exact one.
"""

import torch
from torch import Tensor


def copy_stochastic_(target: Tensor, source: Tensor) -> None:
    """target <- source (fp32); to bf16 with stochastic rounding, to other types as usual."""
    if target.dtype != torch.bfloat16:
        target.copy_(source)
        return
    noise = torch.randint(0, 1 << 16, source.shape, dtype=torch.int32, device=source.device)
    bits = source.contiguous().view(torch.int32) + noise
    target.copy_((bits & ~0xFFFF).view(torch.float32))
