"""The counters of bench/counters.py, and what autograd keeps."""

import importlib.util
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "counters.py"


def bench() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("bench_counters", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


Counters = bench().Counters


def kept(compute: Callable[[], Tensor], own: Collection[Tensor]) -> tuple[Tensor, int]:
    """The result, and the bytes that autograd keeps for its gradient, the memory of `own` left out."""
    known = {tensor.untyped_storage()._cdata for tensor in own}
    held: list[Tensor] = []  # or storages could be freed and counted twice under one address
    with saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
        result = compute()
    sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in held}
    return result, sum(size for key, size in sizes.items() if key not in known)
