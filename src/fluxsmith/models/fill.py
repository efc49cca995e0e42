"""Move tensors from a file into a module that was built on the meta device: strict, streaming, one tensor at a time.

Peak host memory is the target's size plus the largest tensor, because each tensor is read, cast, placed and let go.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from fluxsmith.errors import ModelFileError, Problem

Source = Callable[[], Tensor]
SHOWN = 5  # keys named in a message before the rest is only counted


M = TypeVar("M", bound=nn.Module)


def meta(build: Callable[[], M]) -> M:
    """The module without memory: shapes only."""
    with torch.device("meta"):
        return build()


def check_keys(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], where: str) -> None:
    """Raise one ModelFileError with all missing, unexpected and misshapen keys (the first five of each, and counts)."""
    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    wrong = [
        f"{key} {tuple(found[key])} instead of {tuple(expected[key])}"
        for key in expected
        if key in found and tuple(found[key]) != tuple(expected[key])
    ]
    fix = "use a complete file of this model, or download it again"
    pairs = (("missing", missing), ("unexpected", extra), ("wrong shape", wrong))
    problems = tuple(Problem(f"{len(keys)} tensors {kind}: {_some(keys)}", where, fix=fix) for kind, keys in pairs if keys)
    if problems:
        raise ModelFileError(f"{where}: the tensors do not fit the model", problems=problems)


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (" ..." if len(keys) > SHOWN else "")


@torch.no_grad()
def fill(module: nn.Module, sources: Mapping[str, Source], *, device: torch.device | str, dtype: torch.dtype) -> None:
    """Give every parameter of `module` its tensor; buffers that are computed at build time must not be on meta."""
    for key, source in sources.items():
        owner_name, _, name = key.rpartition(".")
        owner = module.get_submodule(owner_name)
        tensor = source().to(device=device, dtype=dtype)
        setattr(owner, name, nn.Parameter(tensor, requires_grad=False))


def finish(module: nn.Module) -> None:
    """Make sure that nothing was left on the meta device, and switch to eval mode."""
    left = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
    if left:
        raise ModelFileError(f"{len(left)} tensors were not given a value: {_some(left)}", fix="report this as a bug")
    module.eval()


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a module's parameters (adapters left out)."""
    return {name: tuple(tensor.shape) for name, tensor in module.named_parameters() if ".adapters." not in name}
