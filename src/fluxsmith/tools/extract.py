"""A LoRA from the difference of two models, layer by layer: one pair of weights is in memory at a time.

`extract(ExtractRequest({"dit": ("flux1-dev.safetensors", "tuned.safetensors")}, Path("lora.safetensors"), Ranks(number=32)))`
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fluxsmith.adapters.formats.files import write_adapter
from fluxsmith.adapters.formats.naming import BFL
from fluxsmith.adapters.formats.state import AdapterState, LayerState, lora_part
from fluxsmith.adapters.targets import WHOLE, hits
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.io.durable import Disk
from fluxsmith.tools.adapter_file import format_named, new_metadata
from fluxsmith.tools.low_rank import Ranks, residual_energy, svd_of, weighted_left
from fluxsmith.tools.model_file import Given, ModelFile, model_file
from fluxsmith.tools.outputs import cast, dtype_of, make_room, target_path

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ExtractRequest:
    """What to take the difference of, and how to write it."""

    pairs: Mapping[str, tuple[Given, Given]]
    """Role (dit, clip_l, t5xxl) -> original and tuned model: any file, folder or hub id that the role can be read from."""
    target: Path
    ranks: Ranks
    layers: tuple[str, ...] = ("all",)
    """Presets of adapter targets (all, blocks, attention, ...; every layer of a text encoder), or patterns of layer paths."""
    min_difference: float = 0.0
    """Layers in which no weight differs by more than this are left out."""
    clamp_quantile: float | None = None
    """Values of both factors above this quantile are cut off, and below its negative, as sd-scripts does; None keeps all."""
    dtype: str = "bf16"
    format: str = "kohya"
    device: str = "cpu"
    seed: int = 0
    has_metadata: bool = True
    overwrite: bool = False
    is_dry_run: bool = False


class Extracted(NamedTuple):
    """One layer. `norm`: Frobenius norm of the difference; `residual`: share of its square that the factors do not hold, as written."""

    path: str
    rank: int
    norm: float
    residual: float


@dataclass(frozen=True)
class ExtractReport:
    """What came of it."""

    target: str
    layers: tuple[Extracted, ...]
    same: tuple[str, ...]
    """Layers without a difference (above `min_difference`)."""
    left_out: tuple[tuple[str, float], ...]
    """Other tensors that differ (biases, norms, layers not asked for), with the norm of their difference."""
    residual: float
    """Share of all squared differences of the extracted layers that the file does not hold."""
    verdict: str = ""
    notes: tuple[str, ...] = ()

    def as_record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self) | {"layers": [layer._asdict() for layer in self.layers]}


def extract(request: ExtractRequest, progress: Progress = lambda *_: None, *, disk: Disk | None = None) -> ExtractReport:
    """Write the LoRA and say how much of the difference it holds.

    Raises ModelFileError for models that do not belong together or do not differ, ConfigError for settings, StorageError.
    """
    form, dtype, disk = format_named(request.format), dtype_of(request.dtype), disk or Disk()
    _check(request)
    target = target_path(request.target, overwrite=request.overwrite)
    with ExitStack() as files:
        pairs = {
            role: Pair(files.enter_context(model_file(original, role)), files.enter_context(model_file(tuned, role)))
            for role, (original, tuned) in request.pairs.items()
        }
        for role, pair in pairs.items():
            _check_pair(role, pair)
        chosen = [path for role, pair in pairs.items() for path in _chosen(role, pair, request.layers)]
        if not chosen:
            raise ConfigError(f"no layer is chosen by {', '.join(request.layers)}", fix=f"use one of {', '.join(WHOLE)}, or other patterns")
        notes = tuple(note for pair in pairs.values() for note in _notes(pair))
        if request.is_dry_run:
            return ExtractReport(str(target), tuple(Extracted(path, 0, 0.0, 0.0) for path in chosen), (), (), 0.0, "", notes)
        made = _Making(request, pairs, dtype or torch.float32)
        for number, path in enumerate(chosen):
            progress(number, len(chosen), path)
            made.layer(path)
        left_out = tuple(_left_out(pairs, set(chosen), request.min_difference))
        variant = pairs["dit"].tuned.identity.variant if "dit" in pairs else "dev"
    if not made.layers:
        raise ModelFileError("the two models do not differ in the chosen layers", fix="give another pair, or lower --min-difference")
    state = AdapterState(made.layers)
    metadata = new_metadata(state, form, title=target.stem, variant=variant) if request.has_metadata else {}
    make_room(target, disk)
    verdict = write_adapter(target, state, format=form, dtype=dtype, metadata=metadata, disk=disk)
    return ExtractReport(str(target), tuple(made.reports), tuple(made.same), left_out, made.residual(), verdict.text, notes)


class Pair(NamedTuple):
    """The same role of both models."""

    original: ModelFile
    tuned: ModelFile

    def difference(self, key: str, device: str) -> Tensor:
        """tuned - original, fp32."""
        made = self.tuned.read(key, device=device).float()
        return made.sub_(self.original.read(key, device=device).to(made))


class _Making:
    """The layers so far."""

    def __init__(self, request: ExtractRequest, pairs: Mapping[str, Pair], dtype: torch.dtype) -> None:
        self.request, self.pairs, self.dtype = request, pairs, dtype
        self.layers: dict[str, LayerState] = {}
        self.reports: list[Extracted] = []
        self.same: list[str] = []
        self.energies: list[tuple[float, float]] = []

    def layer(self, path: str) -> None:
        """Decompose the difference of one layer."""
        role, _, name = path.partition(".")
        delta = self.pairs[role].difference(f"{name}.weight", self.request.device)
        if not torch.isfinite(delta).all():
            raise ModelFileError(f"the difference of {path} is not finite", fix="check both models with `fluxsmith model identify`")
        if float(delta.abs().max()) <= self.request.min_difference:
            self.same.append(path)
            return
        found = svd_of(delta, self.request.ranks, seed=self.request.seed ^ zlib.crc32(path.encode()))
        up, down = (cast(factor, self.dtype) for factor in _clamped(*weighted_left(found), self.request.clamp_quantile))
        energy, lost = float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2, residual_energy(delta, up, down)
        self.energies.append((energy, lost))
        rank = up.shape[1]
        self.reports.append(Extracted(path, rank, energy**0.5, lost / energy))
        part = lora_part("", 0, delta.shape[0], down.cpu().contiguous(), up.cpu().contiguous(), float(rank))
        self.layers[path] = LayerState((part,), delta.shape[0])

    def residual(self) -> float:
        """Share of all squares that is lost."""
        return sum(lost for _, lost in self.energies) / (sum(energy for energy, _ in self.energies) or 1.0)


def _clamped(up: Tensor, down: Tensor, quantile: float | None) -> tuple[Tensor, Tensor]:
    """Both factors limited to the quantile of all their (signed) values. numpy has no limit on their number, torch.quantile has."""
    if quantile is None or quantile >= 1:
        return up, down
    limit = float(np.quantile(torch.cat((up.flatten(), down.flatten())).cpu().numpy(), quantile))
    return up.clamp(-limit, limit), down.clamp(-limit, limit)


def _check(request: ExtractRequest) -> None:
    ranks = request.ranks
    given = [value for value in (ranks.number, ranks.energy, ranks.ratio) if value is not None]
    if len(given) != 1:
        raise ConfigError("the rank is given in none or several ways", fix="give one of --rank, --energy, --ratio")
    if (ranks.number is not None and ranks.number < 1) or (ranks.limit is not None and ranks.limit < 1):
        raise ConfigError("a rank is at least 1", fix="give 4 to 128")
    if ranks.energy is not None and not 0 < ranks.energy <= 1:
        raise ConfigError(f"energy {ranks.energy:g} is no share", fix="give a number above 0, at most 1, such as 0.95")
    if ranks.ratio is not None and ranks.ratio <= 1:
        raise ConfigError(f"ratio {ranks.ratio:g} keeps no value", fix="give a number above 1, such as 20")
    if request.clamp_quantile is not None and not 0.5 < request.clamp_quantile <= 1:
        raise ConfigError(f"clamp_quantile {request.clamp_quantile:g} is out of range", fix="give 0.99, or 1 for none")
    if not request.pairs:
        raise ConfigError("no pair of models is given", fix="give the original and the tuned model")


def _check_pair(role: str, pair: Pair) -> None:
    original, tuned = pair.original.shapes, pair.tuned.shapes
    odd = [key for key in original.keys() | tuned.keys() if original.get(key) != tuned.get(key)]
    if odd:
        key = min(odd)
        why = f"{len(odd)} tensors, e.g. {key} is {original.get(key, 'absent')} and {tuned.get(key, 'absent')}"
        raise ModelFileError(f"the two {role} models are built differently", where=str(pair.tuned.path), why=why, fix="give the base of it")


def _notes(pair: Pair) -> Iterator[str]:
    narrow = [
        file.path.name for file in pair if file.weights.scaled or any(info.dtype[:3] == "F8_" for info in file.weights.stored.values())
    ]
    if len(narrow) == 1:
        yield f"{narrow[0]} is stored in 8 bits or fewer: its rounding is part of the difference"


def _chosen(role: str, pair: Pair, patterns: tuple[str, ...]) -> list[str]:
    """Layer paths of the chosen layers, in the order of the file."""
    layers = [name for name in pair.tuned.layers() if role != "dit" or BFL.layer(name) is not None]
    return [f"{role}.{name}" for name in layers if any(_wanted(role, name, pattern) for pattern in patterns)]


def _wanted(role: str, name: str, pattern: str) -> bool:
    if pattern not in WHOLE:
        return hits(pattern, f"{role}.{name}")
    return role != "dit" or any(hits(rf"^dit\.({layer})$", f"dit.{name}") for layer in WHOLE[pattern])


def _left_out(pairs: Mapping[str, Pair], chosen: set[str], limit: float) -> Iterator[tuple[str, float]]:
    """Tensors that no LoRA was asked or able to hold, and that differ."""
    for role, pair in pairs.items():
        for key in pair.tuned.shapes:
            path = f"{role}.{key}"
            if path.endswith(".weight") and path.removesuffix(".weight") in chosen:
                continue
            delta = pair.difference(key, "cpu")
            if float(delta.abs().max()) > limit:
                yield path, float(torch.linalg.vector_norm(delta))
