"""Adapters merged into a model's files, tensor by tensor: each at its strength exactly once, computed in fp32.

`merge_into_model(MergeRequest({"dit": "flux1-dev.safetensors"}, {"dit": "merged.safetensors"}, (("cats.safetensors", 0.8),)))`.
The merged model gives what the base gives with the adapters attached. Never more than one layer is in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.io.durable import Disk
from fluxsmith.io.keymaps.apply import disassemble
from fluxsmith.io.safetensors import Lazy, save_weights
from fluxsmith.io.scaled import ScaledFile
from fluxsmith.tools.adapter_file import adapter
from fluxsmith.tools.layer_merge import LayerMerge, Weighted
from fluxsmith.tools.model_file import ROLES, Given, ModelFile, kept_dtype, model_file
from fluxsmith.tools.outputs import cast, dtype_of, make_room, model_metadata, target_path, written_dtype

Progress = Callable[[int, int, str], None]
Layout = Literal["bfl", "same"]
FORM = "fluxsmith.model"  # metadata entry that a model needs to be loaded


@dataclass(frozen=True)
class MergeRequest:
    """Adapters into models."""

    models: Mapping[str, Given]
    """Role (dit, clip_l, t5xxl) -> base: any file, folder or hub id."""
    targets: Mapping[str, Path]
    """Role -> file to write."""
    adapters: tuple[tuple[Path, float], ...]
    """Adapter files of any readable kind, each with its strength."""
    dtype: str = "keep"
    """keep (each tensor's own), fp32, fp16, bf16, fp8 (e4m3) or fp8_e5m2; 8 bits by a plain cast, vectors beside them in bf16."""
    layout: Layout = "bfl"
    """bfl: one model in the names of the original release. same: every tensor of the base file under its own name."""
    device: str = "cpu"
    skips_unmatched: bool = False
    """Leave out what the models have no place for, instead of refusing it."""
    has_metadata: bool = True
    overwrite: bool = False
    is_dry_run: bool = False


@dataclass(frozen=True)
class MergeReport:
    """What was merged."""

    targets: dict[str, str]
    layers: dict[str, int]
    """Adapter file -> its layers that were merged."""
    skipped: tuple[str, ...]
    """Layers that the models have no place for (only with `skips_unmatched`)."""
    bytes: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def merge_into_model(request: MergeRequest, progress: Progress = lambda *_: None, *, disk: Disk | None = None) -> MergeReport:
    """Write the merged models. Raises ModelFileError for files that do not fit together, ConfigError for settings, StorageError."""
    dtype, disk = dtype_of(request.dtype), disk or Disk()
    targets = _targets(request)
    loaded = [Weighted(adapter(path), strength, str(path)) for path, strength in request.adapters]
    plans: list[Plan] = []
    placed: set[str] = set()
    written: dict[str, int] = {}
    with ExitStack() as files:
        for role in targets:
            plan = _plan(request, files.enter_context(model_file(request.models[role], role)), loaded)
            plans.append(plan)
            placed |= plan.places()
        skipped = _unplaced(loaded, placed, request.skips_unmatched)
        notes = tuple(_notes(plans, dtype))
        if not request.is_dry_run:
            for role, plan in zip(targets, plans, strict=True):
                make_room(targets[role], disk)
                tensors = plan.tensors(dtype, progress)
                record = save_weights(targets[role], tensors, _metadata(request, plan, targets[role]), disk=disk)
                written[role] = record.size
    layers = {item.name: sum(path in placed for path in item.state.layers) for item in loaded}
    return MergeReport({role: str(path) for role, path in targets.items()}, layers, skipped, written, notes)


def _targets(request: MergeRequest) -> dict[str, Path]:
    if not request.adapters:
        raise ConfigError("no adapter is given", fix="give at least one adapter file")
    unknown = [role for role in request.models if role not in ROLES]
    if unknown or not request.models:
        raise ConfigError(f"no model for {', '.join(ROLES)} is given" if not unknown else f"{unknown[0]} is no model that takes adapters")
    if set(request.models) != set(request.targets):
        odd = sorted(set(request.models) ^ set(request.targets))
        raise ConfigError(f"model and output do not come together for {', '.join(odd)}", fix="give one output for each model")
    targets = {role: target_path(request.targets[role], overwrite=request.overwrite) for role in request.models}
    if len({path.absolute() for path in targets.values()}) < len(targets):
        raise ConfigError("two models would be written to the same file", fix="give each its own output")
    return targets


class Section(NamedTuple):
    """One role inside a file, with what is merged into it."""

    file: ModelFile
    merge: LayerMerge


class Plan:
    """How one file is written."""

    def __init__(self, sections: Sequence[Section], layout: Layout) -> None:
        self.sections, self.layout = sections, layout
        self.weights: ScaledFile = sections[0].file.weights

    def places(self) -> set[str]:
        """Layer paths and parameters that it takes."""
        return {path for section in self.sections for path in section.merge.changed}

    def tensors(self, dtype: torch.dtype | None, progress: Progress) -> dict[str, Lazy]:
        """Every tensor to be written, made when its turn comes."""
        made: dict[str, Lazy] = {}
        if self.layout == "bfl":
            for key in self.sections[0].file.shapes:
                made[key] = self._canonical(self.sections[0], key, dtype)
        else:
            made = self._same(dtype)
        total = len(made)
        return {name: _told(lazy, progress, (number, total, name)) for number, (name, lazy) in enumerate(made.items())}

    def _canonical(self, section: Section, key: str, dtype: torch.dtype | None) -> Lazy:
        file, merge = section
        shape = merge.shape(key)
        chosen = written_dtype(file.dtype(key), shape, dtype)
        return Lazy(chosen, shape, lambda: cast(merge.tensor(key), chosen).cpu().contiguous())

    def _same(self, dtype: torch.dtype | None) -> dict[str, Lazy]:
        """Stored names. The parts of a fused layer that are not asked for yet are kept until they are."""
        made: dict[str, Lazy] = {}
        for section in self.sections:
            kept: dict[str, Tensor] = {}
            for key, recipe in section.file.recipes.items():
                for name in recipe.keys:
                    shape = section.merge.stored_shape(key, name)
                    chosen = written_dtype(kept_dtype(self.weights, name), shape, dtype)
                    made[name] = Lazy(chosen, shape, _part_maker(section, key, name, chosen, kept))
        for name, info in self.weights.infos.items():
            if name not in made:
                made[name] = Lazy(kept_dtype(self.weights, name), info.shape, _copier(self.weights, name))
        return made


def _part_maker(section: Section, key: str, name: str, dtype: torch.dtype, kept: dict[str, Tensor]) -> Callable[[], Tensor]:
    def make() -> Tensor:
        if name not in kept:
            kept.update(disassemble(section.file.recipes[key], section.merge.tensor(key), section.file.hidden()))
        return cast(kept.pop(name), dtype).cpu().contiguous()

    return make


def _copier(weights: ScaledFile, name: str) -> Callable[[], Tensor]:
    return lambda: weights.tensor(name, dtype=kept_dtype(weights, name))


def _told(lazy: Lazy, progress: Progress, step: tuple[int, int, str]) -> Lazy:
    def make() -> Tensor:
        progress(*step)
        return lazy.make()

    return lazy._replace(make=make)


def _plan(request: MergeRequest, file: ModelFile, adapters: Sequence[Weighted]) -> Plan:
    """What goes where in one base."""
    files = [file]
    if request.layout == "same":  # an all-in-one file takes everything that it has a place for
        others = [role for role in ROLES if role in file.identity.roles() and role not in request.models]
        files += [ModelFile(file.weights, file.identity, role) for role in others]
    return Plan([Section(own, LayerMerge(own, adapters, request.device)) for own in files], request.layout)


def _unplaced(adapters: Sequence[Weighted], placed: set[str], skips: bool) -> tuple[str, ...]:
    """Layers without a place. Raises ModelFileError unless they are to be skipped, or if nothing has a place."""
    found = [(path, item.name) for item in adapters for path in (*item.state.layers, *item.state.replaced) if path not in placed]
    if not found:
        return ()
    total = sum(len(item.state.layers) for item in adapters)
    path, name = found[0]
    why = f"{len(found)} of {total} layers of {', '.join(dict.fromkeys(name for _, name in found))} have no place, e.g. {path}"
    if not skips or not placed:
        raise ModelFileError("the models given do not have all layers of the adapters", where=name, why=why, fix=_cure(path, skips))
    return tuple(dict.fromkeys(path for path, _ in found))


def _cure(path: str, skips: bool) -> str:
    role = path.split(".", 1)[0]
    option = {"clip_l": "--clip-l FILE OUTPUT", "t5xxl": "--t5xxl FILE OUTPUT"}.get(role)
    if skips:
        return "give the models that the adapters are for"
    return f"give {option} too, or --skip-unmatched" if option else "give the model that they are for, or --skip-unmatched"


def _notes(plans: Sequence[Plan], dtype: torch.dtype | None) -> Iterator[str]:
    narrow = dtype is not None and dtype.itemsize == 1
    if narrow or (dtype is None and any(info.dtype.startswith("F8_") for plan in plans for info in plan.weights.infos.values())):
        yield "8-bit weights have steps of 6 to 12 %: much of a small adapter's change is lost in them; bf16 keeps it"
    if dtype is None and any(plan.weights.scaled for plan in plans):
        yield "the base has weights in few bits with scales: they are written as bf16"


def _metadata(request: MergeRequest, plan: Plan, target: Path) -> dict[str, str]:
    entries = plan.weights.metadata
    if not request.has_metadata:
        return {key: entries[key] for key in (FORM,) if key in entries}
    chain = [plan.sections[0].file.path.name, *(f"{path.name} x {strength:g}" for path, strength in request.adapters)]
    return model_metadata(plan.sections[0].file.identity, entries, target.stem, " + ".join(chain))
