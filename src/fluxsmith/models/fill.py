"""Move tensors from a file into a module that was built on the meta device: strict, streaming, one tensor at a time.

Peak host memory is the target's size plus the largest tensor, because each tensor is read, cast, placed and let go.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fluxsmith.errors import ModelFileError, Problem
from fluxsmith.io import canonical

Source = Callable[[], Tensor]
BLOCK = re.compile(r"(double_blocks\.\d+|single_blocks\.\d+|encoder\.block\.\d+)\.")
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


class ByBlock(NamedTuple):
    """What is done to each block of a model as soon as its tensors are there, so that the whole is never in memory as it was."""

    device: torch.device
    """Where a block is filled and finished, before it goes to its place."""
    finish: Callable[[str, nn.Module], None]
    """Called with the block's path and the block."""
    take: Callable[[str, nn.Module, canonical.Source], nn.Module | None]
    """Called with a layer whose weight is stored in fewer bits: what takes its place, or None to read what the weight stands for."""


@torch.no_grad()
def fill_by_block(
    module: nn.Module, sources: Mapping[str, canonical.Source], how: ByBlock, *, device: torch.device | str, dtype: torch.dtype
) -> None:
    """As `fill`, with every block finished on the way."""
    for path, keys in groupby(sources, lambda key: match[1] if (match := BLOCK.match(key)) else ""):
        taken: list[str] = []
        for key in keys:
            owner, _, leaf = key.rpartition(".")
            made = how.take(owner, module.get_submodule(owner), sources[key]) if sources[key].form and leaf == "weight" else None
            if made is None:
                fill(module, {key: sources[key].read}, device=how.device if path else device, dtype=dtype)
            else:
                module.set_submodule(owner, made)
                taken.append(owner)
        if path:
            how.finish(path, module.get_submodule(path))
        for owner in [path] if path else taken:
            module.get_submodule(owner).to(device)


def finish(module: nn.Module) -> None:
    """Make sure that nothing was left on the meta device, and switch to eval mode."""
    left = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
    if left:
        raise ModelFileError(f"{len(left)} tensors were not given a value: {_some(left)}", fix="report this as a bug")
    module.eval()


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a module's parameters (adapters left out)."""
    return {name: tuple(tensor.shape) for name, tensor in module.named_parameters() if ".adapters." not in name}
