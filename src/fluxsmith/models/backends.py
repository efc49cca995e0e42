"""The table of attention back-ends: torch's own by name, and kernels of optional packages, each refused where it cannot work.

`attend = backend("flash", device, trains=True, masked=False)` has the signature of `attention`. `auto` leaves the choice to torch.
"""

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxsmith.errors import ConfigError
from fluxsmith.models.attention import attention

Name = Literal["auto", "sdpa", "flash", "cudnn", "efficient", "math", "flash3", "sage"]
Attend = Callable[..., Tensor]  # q (B, H, N, D), k, v (B, H, M, D), mask -> (B, N, H*D)
OWN = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
CARD_ONLY = ("cudnn", "efficient", "flash3", "sage")


class Package(NamedTuple):
    """A kernel of an optional package."""

    module: str
    install: str
    can_train: bool


PACKAGES = {
    "flash3": Package("flash_attn_interface", "build it from github.com/Dao-AILab/flash-attention, folder hopper", can_train=True),
    "sage": Package("sageattention", "pip install sageattention", can_train=False),
}


def backend(name: str, device: torch.device, *, trains: bool, masked: bool) -> Attend:
    """The function of a back-end. Raises ConfigError, before anything is loaded, where it cannot do what is asked."""
    if name in ("auto", "sdpa"):
        return attention
    if name in CARD_ONLY and device.type != "cuda":
        raise ConfigError(f'attention "{name}" needs a CUDA device', fix='write memory.attention = "auto"')
    if name in OWN:
        if masked and name == "flash":
            raise ConfigError(
                'attention "flash" takes no mask', why="padding of the text is hidden", fix='write memory.attention = "efficient"'
            )
        return _own(OWN[name])
    package = PACKAGES[name]
    if trains and not package.can_train:
        fix = 'write memory.attention = "auto" for training; it can be used to draw'
        raise ConfigError(f'attention "{name}" has no backward pass', fix=fix)
    if masked:
        raise ConfigError(f'attention "{name}" takes no mask', why="padding of the text is hidden", fix='write memory.attention = "auto"')
    if find_spec(package.module) is None:
        raise ConfigError(f'attention "{name}" needs the package {package.module}', fix=package.install)
    return {"flash3": _flash3, "sage": _sage}[name](importlib.import_module(package.module))


def _own(kind: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    return attend


def _flash3(module: Any) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        found = module.flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # tokens before heads
        return (found[0] if isinstance(found, tuple) else found).flatten(2)

    return attend


def _sage(module: Any) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return module.sageattn(q, k, v, tensor_layout="HND", is_causal=False).transpose(1, 2).flatten(2)

    return attend
