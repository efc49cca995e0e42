"""Which table of steps a run uses: torch's own kernels or those of this folder, refused where they cannot work."""

import importlib
from importlib.util import find_spec
from typing import Literal

import torch

from fluxsmith.errors import ConfigError
from fluxsmith.models.ops import LEAN, Ops

Name = Literal["auto", "torch", "triton"]


def kernel_ops(name: Name, device: torch.device) -> Ops:
    """The table of a name. `auto` is torch's as long as no measurement on a card says otherwise. Raises ConfigError."""
    if name != "triton":
        return LEAN
    fix = 'write memory.kernels = "torch"'
    if device.type != "cuda":
        raise ConfigError('kernels = "triton" needs a CUDA device', fix=fix)
    if find_spec("triton") is None:
        raise ConfigError('kernels = "triton" needs the package triton', why="it is not installed", fix=f"pip install triton, or {fix}")
    return importlib.import_module("fluxsmith.models.kernels.table").TRITON
