"""A model written in fewer bits, tensor by tensor: `quantize(QuantizeRequest("dev.safetensors", Path("dev-int4.safetensors"), "int4"))`.

The file is read back strictly, by `load_dit` and by every tool, as what it stands for; a run with the same `quant` takes its tensors as
they are. Never more than one layer is in memory.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from fluxsmith.errors import ConfigError
from fluxsmith.io.durable import Disk
from fluxsmith.io.forms import names_of
from fluxsmith.io.safetensors import Lazy, save_weights
from fluxsmith.models.linear import Linear
from fluxsmith.quant.base import config_for, plugin
from fluxsmith.tools.model_file import ROLES, Given, ModelFile, model_file, roles_in
from fluxsmith.tools.outputs import cast, dtype_of, fresh, make_room, target_path, written_dtype

Progress = Callable[[int, int, str], None]
KINDS = ("fp8", "int8", "int4", "int2", "nf4")
ENTRY = "fluxsmith.quant"  # metadata entry: kind and options, as JSON


@dataclass(frozen=True)
class QuantizeRequest:
    """One model into fewer bits."""

    model: Given
    """Any file, folder or hub id of a transformer, CLIP-L or T5."""
    target: Path
    """File to write."""
    kind: str
    """fp8, int8, int4, int2 or nf4."""
    options: Mapping[str, Any] | None = None
    """Further options of the kind, as in `[quant]`: modulation, embedders, exclude, group, symmetric, scale."""
    role: str = ""
    """dit, clip_l or t5xxl; by default what the file is."""
    dtype: str = "keep"
    """Type of the tensors that are not quantised."""
    device: str = "cpu"
    overwrite: bool = False
    is_dry_run: bool = False


@dataclass(frozen=True)
class QuantizeReport:
    """What was written."""

    target: str
    role: str
    layers: dict[str, int]
    """Form -> number of layers."""
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...] = ()

    def as_record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def quantize(request: QuantizeRequest, progress: Progress = lambda *_: None, *, disk: Disk | None = None) -> QuantizeReport:
    """Write the file. Raises ConfigError for settings, ModelFileError for what is no such model, StorageError."""
    config, dtype, disk = _config(request), dtype_of(request.dtype), disk or Disk()
    target = target_path(request.target, overwrite=request.overwrite)
    role = request.role or _role(request.model)
    with model_file(request.model, role) as file:
        plan = Plan(file, config, role, request.device)
        tensors = plan.tensors(dtype)
        after = sum(lazy.dtype.itemsize * torch.Size(lazy.shape).numel() for lazy in tensors.values())
        notes = (
            (f"{len(file.weights.scaled)} weights of {file.path} are in few bits already: they lose twice",) if file.weights.scaled else ()
        )
        report = QuantizeReport(str(target), role, dict(Counter(plan.forms.values())), file.identity.sizes["bytes"], after, notes)
        if not request.is_dry_run:
            make_room(target, disk)
            options = {"kind": request.kind, **(request.options or {})}
            metadata = {"format": "pt", **fresh(file.weights.metadata), ENTRY: json.dumps(options, sort_keys=True)}
            total = len(tensors)
            told = {name: _told(lazy, progress, (number, total, name)) for number, (name, lazy) in enumerate(tensors.items())}
            save_weights(target, told, metadata, disk=disk)
    return report


def _config(request: QuantizeRequest) -> Any:
    if request.kind not in KINDS:
        raise ConfigError(f"there is no kind {request.kind!r}", fix=f"use one of {', '.join(KINDS)}")
    base = type(plugin(request.kind))
    try:
        return base.model_validate({"type": request.kind, "text_encoders": True, **(request.options or {})})
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(name for name in base.model_fields if name not in ("type", "text_encoders", "via", "compute", "backend"))
        raise ConfigError(f"{request.kind}: {'.'.join(map(str, first['loc']))}: {first['msg']}", fix=f"its options are {known}") from error


def _role(given: Given) -> str:
    roles = roles_in(Path(given)) if Path(given).is_file() else ()
    if len(roles) > 1:
        raise ConfigError(f"{given} holds {', '.join(roles)}", fix=f"choose one with --role, for example --role {roles[0]}")
    return roles[0] if roles else ROLES[0]


class Plan:
    """Which layers of a file go into which form. `forms`: layer -> form, of those that are quantised."""

    def __init__(self, file: ModelFile, config: Any, role: str, device: str) -> None:
        self.file, self.device = file, device
        self.chosen: dict[str, Any] = {}
        for name in file.layers():
            out_features, in_features = file.shapes[f"{name}.weight"]
            chosen = config_for(config, f"{role}.{name}", Linear(in_features, out_features, device="meta"))
            if chosen is not None:
                self.chosen[name] = chosen
        self.forms: dict[str, str] = {name: chosen.type for name, chosen in self.chosen.items()}
        self.small: dict[str, dict[str, Tensor]] = {}  # scales and the like of layers whose values are not written yet

    def tensors(self, dtype: torch.dtype | None) -> dict[str, Lazy]:
        """Every tensor to be written, made when its turn comes."""
        made: dict[str, Lazy] = {}
        for key, shape in self.file.shapes.items():
            layer = key.removesuffix(".weight")
            if key.endswith(".weight") and layer in self.chosen:
                outline = self.chosen[layer].encode(torch.empty(shape, device="meta"))
                for part, name in names_of(key, self.forms[layer]).items():
                    made[name] = Lazy(outline[part].dtype, tuple(outline[part].shape), _maker(self, layer, part))
            else:
                chosen = written_dtype(self.file.dtype(key), shape, dtype)
                made[key] = Lazy(chosen, shape, _copier(self.file, key, chosen))
        return made

    def part(self, layer: str, part: str) -> Tensor:
        """One stored tensor. A file's order puts all scales before all values, so layers are computed twice instead of being kept."""
        if part and layer in self.small:
            return self.small[layer].pop(part)
        parts = self.chosen[layer].encode(self.file.read(f"{layer}.weight", device=self.device).float())
        parts = {name: tensor.cpu().contiguous() for name, tensor in parts.items()}
        wanted = parts.pop(part)
        if part:
            self.small[layer] = {name: tensor for name, tensor in parts.items() if name}
        return wanted


def _maker(plan: Plan, layer: str, part: str) -> Callable[[], Tensor]:
    return lambda: plan.part(layer, part)


def _copier(file: ModelFile, key: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: cast(file.read(key), dtype).contiguous()


def _told(lazy: Lazy, progress: Progress, place: tuple[int, int, str]) -> Lazy:
    def make() -> Tensor:
        progress(*place)
        return lazy.make()

    return lazy._replace(make=make)
