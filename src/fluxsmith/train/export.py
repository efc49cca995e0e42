"""Weights files for use elsewhere: the adapter with its verdict, or the trained parts in their own file keys."""

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from fluxsmith.adapters.formats.files import write_adapter
from fluxsmith.controls.controlnet_model import ControlNet, file_tensors
from fluxsmith.events import Bus, WeightsSaved
from fluxsmith.io.durable import Disk
from fluxsmith.io.metadata import modelspec, training_metadata
from fluxsmith.io.safetensors import save_weights
from fluxsmith.train.facts import model_spec, training_facts
from fluxsmith.train.setup import Parts
from fluxsmith.train.trained import DTYPES
from fluxsmith.train.update import evaluated


def export_weights(parts: Parts, path: Path, step: int, disk: Disk, bus: Bus) -> Path:
    """Write the weights of this step to `path`; returns the (first) file. With an average (EMA), the file holds the average.

    The main process writes; in a sharded run the others take part. Raises StorageError, and NumericError for weights that are not finite.
    """
    if not parts.world.is_main and not parts.trained.placement.spans:
        return Path()
    with nullcontext() if parts.ema is not None else evaluated(parts):
        values = _values(parts)
        if not parts.world.is_main:
            return Path()
        disk.make_folder(path.parent)
        if parts.trained.adapters is not None:
            _write_adapter(parts, values, path, step, (disk, bus))
        else:
            path = _write_components(parts, values, path.with_suffix(""), step, (disk, bus))
    return path


def _values(parts: Parts) -> dict[str, Tensor]:
    """What the files hold; shares are put together on the main process's host, in the files' type."""
    place, dtype = parts.trained.placement, DTYPES[parts.config.checkpoint.dtype]
    found = parts.ema.shadow if parts.ema is not None else {name: param.detach() for name, param in parts.trained.params.items()}
    values: dict[str, Tensor] = {}
    for name, value in found.items():
        whole = place.whole(name, value.to(dtype) if name in place.spans else value)
        if parts.world.is_main:
            values[name] = whole
    return values


def _write_adapter(parts: Parts, values: dict[str, Tensor], path: Path, step: int, out: tuple[Disk, Bus]) -> None:
    disk, bus = out
    settings = parts.config.checkpoint
    facts, spec = training_facts(parts, step, path.stem), model_spec(parts)
    metadata = training_metadata(facts, spec, minimal=settings.metadata == "minimal")
    if parts.trained.adapters is None:
        raise ValueError("this run trains no adapter")
    state, dtype = parts.trained.adapters.state(values), DTYPES[settings.dtype]
    verdict = write_adapter(path, state, format=settings.format, dtype=dtype, metadata=metadata, disk=disk)
    bus.send(WeightsSaved(step, str(path), {**verdict.as_record(), "line": verdict.text}))


def _write_components(parts: Parts, tensors: dict[str, Tensor], stem: Path, step: int, out: tuple[Disk, Bus]) -> Path:
    """One file a role; the first has the plain name and is written last, so that its presence says that all are there."""
    (disk, bus), dtype = out, DTYPES[parts.config.checkpoint.dtype]
    roles = list(dict.fromkeys(key.split(".", 1)[0] for key in tensors))
    path = stem
    for role in reversed(roles):
        path = stem.with_name(f"{stem.name}.safetensors" if role == roles[0] else f"{stem.name}-{role}.safetensors")
        own = {key.split(".", 1)[1]: _cast(value, dtype) for key, value in tensors.items() if key.startswith(f"{role}.")}
        spec = modelspec(model_spec(parts, adapter="")) if role in ("dit", "controlnet") else {}
        save_weights(path, _as_file(parts, role, own), {**parts.files.metadata("dit" if role == "controlnet" else role), **spec}, disk=disk)
        bus.send(WeightsSaved(step, str(path)))
    return path


def _as_file(parts: Parts, role: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A control model's file may name tensors otherwise than the model does."""
    net = next((control.nets[0] for control in parts.models.controls if control.role == role), None)
    return file_tensors(net, tensors) if isinstance(net, ControlNet) else tensors


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
