"""The weighted sum of whole models, tensor by tensor.

`blend(BlendRequest((("a.safetensors", 0.5), ("b.safetensors", 0.5)), Path("c.safetensors")))`
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.io.durable import Disk
from fluxsmith.io.safetensors import Lazy, save_weights
from fluxsmith.tools.model_file import Given, ModelFile, model_file
from fluxsmith.tools.outputs import cast, dtype_of, make_room, model_metadata, target_path, written_dtype

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class BlendRequest:
    """Models of one structure, each with its share."""

    models: tuple[tuple[Given, float], ...]
    """Any layouts; shares usually add up to 1."""
    target: Path
    role: str = "dit"
    dtype: str = "keep"
    """keep: the types of the first model."""
    device: str = "cpu"
    overwrite: bool = False


def blend(request: BlendRequest, progress: Progress = lambda *_: None, *, disk: Disk | None = None) -> dict[str, Any]:
    """Write sum(share * model), computed in fp32. Raises ModelFileError for models of different structure, ConfigError, StorageError.

    A tensor that only some of the models have is the mean of those that have it, by their shares.
    """
    dtype, disk = dtype_of(request.dtype), disk or Disk()
    if len(request.models) < 2:
        raise ConfigError("one model makes no blend", fix="give two or more")
    target = target_path(request.target, overwrite=request.overwrite)
    with ExitStack() as stack:
        files = [(stack.enter_context(model_file(path, request.role)), share) for path, share in request.models]
        keys = list(dict.fromkeys(key for file, _ in files for key in file.shapes))
        plan = {key: [(file, share) for file, share in files if key in file.shapes] for key in keys}
        _check(plan, files)
        tensors = {key: _lazy(key, plan[key], request, dtype, (number, len(keys), progress)) for number, key in enumerate(keys)}
        chain = " + ".join(f"{Path(path).name} x {share:g}" for path, share in request.models)
        metadata = model_metadata(files[0][0].identity, files[0][0].weights.metadata, target.stem, chain)
        make_room(target, disk)
        record = save_weights(target, tensors, metadata, disk=disk)
    partial = [key for key in keys if len(plan[key]) < len(files)]
    return {"target": str(target), "tensors": len(keys), "bytes": record.size, "in_some_only": partial}


Holders = list[tuple[ModelFile, float]]


def _check(plan: dict[str, Holders], files: Holders) -> None:
    odd = [key for key, holders in plan.items() if len({file.shapes[key] for file, _ in holders}) > 1]
    if odd:
        shapes = ", ".join(f"{file.path.name} {file.shapes[odd[0]]}" for file, _ in plan[odd[0]])
        raise ModelFileError("the models are built differently", why=f"{len(odd)} tensors, e.g. {odd[0]}: {shapes}", fix="blend one kind")
    families = {file.identity.family for file, _ in files}
    if len(families) > 1:
        raise ModelFileError(f"these are models of different families: {', '.join(sorted(families))}", fix="blend one kind")
    alone = [key for key, holders in plan.items() if len(holders) < len(files) and sum(share for _, share in holders) == 0]
    if alone:
        raise ConfigError(f"the shares of the models that have {alone[0]} add up to 0", fix="give other shares")


def _lazy(key: str, holders: Holders, request: BlendRequest, dtype: torch.dtype | None, told: tuple[int, int, Progress]) -> Lazy:
    first = holders[0][0]
    chosen = written_dtype(first.dtype(key), first.shapes[key], dtype)
    number, total, progress = told
    whole = sum(share for _, share in request.models)
    factor = 1.0 if len(holders) == len(request.models) else whole / sum(share for _, share in holders)

    def make() -> Tensor:
        progress(number, total, key)
        made = holders[0][0].read(key, device=request.device).float() * (holders[0][1] * factor)
        for file, share in holders[1:]:
            made.add_(file.read(key, device=request.device).to(made), alpha=share * factor)
        return cast(made, chosen).cpu().contiguous()

    return Lazy(chosen, first.shapes[key], make)
