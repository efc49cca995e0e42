"""A face's vector from plain numbers or from a file of them: .json with a list, or .safetensors with one tensor."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fluxsmith.errors import DataError
from fluxsmith.io.safetensors import open_weights


def read_embedding(given: Path | Sequence[float]) -> Tensor:
    """The vector (E,), fp32. Raises DataError for a file that holds something else, ModelFileError for a broken one."""
    if not isinstance(given, Path):
        return torch.tensor(tuple(given), dtype=torch.float32)
    where, fix = str(given), "write the face's numbers as a list, or as one tensor"
    if given.suffix == ".safetensors":
        with open_weights(given) as weights:
            names = list(weights)
            if len(names) != 1:
                raise DataError(f"a face vector is one tensor, the file holds {len(names)}", where=where, fix=fix)
            return weights.tensor(names[0], dtype=torch.float32).flatten()
    try:
        values = json.loads(given.read_text(encoding="utf-8"))
        return torch.tensor(values, dtype=torch.float32).flatten()
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise DataError("the face vector cannot be read", where=where, why=str(error).splitlines()[0], fix=fix) from error
