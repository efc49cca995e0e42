"""Weights files for use elsewhere: the adapter, or the trained parts in their own file keys."""

from pathlib import Path

import torch

from fluxsmith.events import Bus, WeightsSaved
from fluxsmith.io.durable import Disk
from fluxsmith.io.safetensors import save_weights
from fluxsmith.train.setup import Parts
from fluxsmith.train.trained import DTYPES


def export_weights(parts: Parts, step: int, disk: Disk, bus: Bus, *, final: bool = False) -> Path:
    """Write the weights of this step; returns the (first) file. With an average, `NAME.safetensors` holds it."""
    if not parts.world.is_main:
        return Path()
    name = parts.config.run.name or parts.config.run.dir.name
    stem = name if final else f"{name}-step{step:08d}"
    folder = parts.config.run.dir / "weights"
    disk.mkdir(folder)
    dtype = DTYPES[parts.config.checkpoint.dtype]
    tensors = parts.ema.shadow if parts.ema is not None else {name: p.detach() for name, p in parts.trained.params.items()}
    written = []
    for role in dict.fromkeys(key.split(".", 1)[0] for key in tensors):
        path = folder / (f"{stem}.safetensors" if not written else f"{stem}-{role}.safetensors")
        own = {key.split(".", 1)[1]: _cast(value, dtype) for key, value in tensors.items() if key.startswith(f"{role}.")}
        save_weights(path, own, _metadata(parts, role), disk=disk)
        bus.send(WeightsSaved(step, str(path)))
        written.append(path)
    return written[0]


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _metadata(parts: Parts, role: str) -> dict[str, str]:
    """What the file it started from said about itself (numbers that tensors cannot tell) stays true."""
    return parts.files.metadata(role)
