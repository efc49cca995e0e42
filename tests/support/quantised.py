"""Every kind of quantised base, one small layer, and how far two tensors are apart."""

from typing import Any

import torch
from torch import Tensor

from fluxsmith.models.linear import Linear
from fluxsmith.quant.base import plugin

BASES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> kind, options
    "fp8": ("fp8", {}),
    "fp8-dynamic": ("fp8", {"compute": "dynamic"}),
    "int8": ("int8", {}),
    "int8-dynamic": ("int8", {"compute": "dynamic"}),
    "int4": ("int4", {}),
    "int4-symmetric": ("int4", {"symmetric": True, "group": 64}),
    "int2": ("int2", {}),
    "nf4": ("nf4", {"backend": "torch"}),
    "nf4-kernel": ("nf4", {"backend": "bitsandbytes"}),
}
EXACT = [name for name in BASES if "dynamic" not in name]  # their product is that of the dequantised weight


def config_of(name: str, **more: Any) -> Any:
    """The `Config` of a base."""
    kind, options = BASES[name]
    return plugin(kind).model_copy(update={**options, **more})


def layer(out_features: int = 48, in_features: int = 64) -> Linear:
    """Frozen, normally distributed weights."""
    made = Linear(in_features, out_features)
    with torch.no_grad():
        torch.nn.init.normal_(made.weight, std=0.02, generator=torch.Generator().manual_seed(0))
        torch.nn.init.normal_(made.bias, generator=torch.Generator().manual_seed(1))
    return made.requires_grad_(False)


def relative(one: Tensor, other: Tensor) -> float:
    """Relative L2 distance."""
    return float((one - other).detach().norm() / other.detach().norm())


def cosine(one: Tensor, other: Tensor) -> float:
    """Of the angle between two tensors."""
    return float(torch.nn.functional.cosine_similarity(one.detach().flatten().double(), other.detach().flatten().double(), dim=0))
