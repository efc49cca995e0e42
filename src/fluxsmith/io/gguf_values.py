"""What the values of GGUF's quantised forms stand for: the `gguf` package's arithmetic, an optional door (pip install fluxsmith[gguf]).

`dequantised(data, "Q4_K", (3072, 64))` -> fp32.
"""

import numpy as np
import torch
from torch import Tensor

from fluxsmith.errors import ModelFileError


def dequantised(data: Tensor, kind: str, shape: tuple[int, ...]) -> Tensor:
    """Stored bytes (uint8, any shape) -> (out, in) fp32. Raises ModelFileError where the package is missing or does not know the form."""
    try:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise ModelFileError(f"weights in {kind} need the gguf package", why=str(error), fix="pip install gguf") from error
    rows = data.numpy().reshape(int(np.prod(shape[:-1], dtype=np.int64)), -1)
    try:
        values = dequantize(rows, GGMLQuantizationType[kind])
    except (NotImplementedError, KeyError) as error:
        fix = "pip install --upgrade gguf, or get the file in another form"
        raise ModelFileError(f"weights in {kind} are not known to the gguf package", why=str(error)[:200], fix=fix) from error
    return torch.from_numpy(values).reshape(shape)
