"""Weights files for use elsewhere: the adapter with its verdict, or the trained parts in their own file keys."""

from pathlib import Path

import torch
from torch import Tensor

from fluxsmith.adapters.formats.files import write_adapter
from fluxsmith.events import Bus, WeightsSaved
from fluxsmith.io.durable import Disk
from fluxsmith.io.metadata import modelspec, training_metadata
from fluxsmith.io.safetensors import save_weights
from fluxsmith.train.facts import model_spec, training_facts
from fluxsmith.train.setup import Parts
from fluxsmith.train.trained import DTYPES


def export_weights(parts: Parts, step: int, disk: Disk, bus: Bus, *, final: bool = False) -> Path:
    """Write the weights of this step; returns the (first) file. With an average (EMA), the file holds the average.

    Raises StorageError, and NumericError for weights that are not finite.
    """
    if not parts.world.is_main:
        return Path()
    name = parts.config.run.name or parts.config.run.dir.name
    stem = name if final else f"{name}-step{step:08d}"
    folder = parts.config.run.dir / "weights"
    disk.mkdir(folder)
    if parts.trained.adapters is not None:
        path = folder / f"{stem}.safetensors"
        _write_adapter(parts, path, step, disk, bus)
    else:
        path = _write_components(parts, folder / stem, step, disk, bus)
    if not final:
        _retire(parts, folder, name, disk)
    return path


def _values(parts: Parts) -> dict[str, Tensor]:
    return parts.ema.shadow if parts.ema is not None else {name: param.detach() for name, param in parts.trained.params.items()}


def _write_adapter(parts: Parts, path: Path, step: int, disk: Disk, bus: Bus) -> None:
    settings = parts.config.checkpoint
    facts, spec = training_facts(parts, step, path.stem), model_spec(parts)
    metadata = training_metadata(facts, spec, minimal=settings.metadata == "minimal")
    if parts.trained.adapters is None:
        raise ValueError("this run trains no adapter")
    verdict = write_adapter(
        path, parts.trained.adapters.state(_values(parts)), format=settings.format, dtype=DTYPES[settings.dtype], metadata=metadata, disk=disk
    )
    bus.send(WeightsSaved(step, str(path), {**verdict.as_record(), "line": verdict.text}))


def _write_components(parts: Parts, stem: Path, step: int, disk: Disk, bus: Bus) -> Path:
    """One file a role; the first has the plain name."""
    tensors, dtype = _values(parts), DTYPES[parts.config.checkpoint.dtype]
    written: list[Path] = []
    for role in dict.fromkeys(key.split(".", 1)[0] for key in tensors):
        path = stem.with_name(f"{stem.name}.safetensors" if not written else f"{stem.name}-{role}.safetensors")
        own = {key.split(".", 1)[1]: _cast(value, dtype) for key, value in tensors.items() if key.startswith(f"{role}.")}
        spec = modelspec(model_spec(parts, adapter="")) if role == "dit" else {}
        save_weights(path, own, {**parts.files.metadata(role), **spec}, disk=disk)
        bus.send(WeightsSaved(step, str(path)))
        written.append(path)
    return written[0]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _retire(parts: Parts, folder: Path, name: str, disk: Disk) -> None:
    """Keep the newest `checkpoint.keep_weights` intermediate files; only files this run named are touched."""
    keep = parts.config.checkpoint.keep_weights
    if keep is not None:
        steps = sorted({path.name[: len(name) + 13] for path in folder.glob(f"{name}-step????????*.safetensors")})
        disk.prune([path for old in steps[:-keep] for path in sorted(folder.glob(f"{old}*.safetensors"))])
