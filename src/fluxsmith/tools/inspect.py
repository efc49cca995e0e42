"""What an adapter file is and holds, whether it is sound, and where it loads. Nothing is changed.

`inspect("cats.safetensors").ranks` is {"img_attn": {16: 38}, ...}; `check("cats.safetensors", base="flux1-dev.safetensors")`.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxsmith.adapters.formats.files import read_open
from fluxsmith.adapters.formats.state import AdapterState, LayerState
from fluxsmith.adapters.formats.verdict import Verdict, verdict_of
from fluxsmith.adapters.load import norm_of
from fluxsmith.adapters.targets import LAYER_TYPES, layer_type
from fluxsmith.errors import ModelFileError
from fluxsmith.io.canonical import canonical
from fluxsmith.io.identify import Identity, identify, require_role
from fluxsmith.io.safetensors import WeightsFile, open_weights
from fluxsmith.io.scaled import open_scaled

HUGE = 1e3  # Frobenius norm of a layer's difference beyond which a file is suspect


@dataclass(frozen=True)
class Inspection:
    """What a file holds. Layer figures are empty for a file that cannot be read; norms for kinds that need the base weight (OFT, ...)."""

    path: str
    kind: str
    format: str
    bytes: int
    tensors: int
    dtypes: dict[str, int]
    roles: dict[str, int] = field(default_factory=dict)
    """Layers per model: dit, clip_l, t5xxl."""
    ranks: dict[str, dict[int, int]] = field(default_factory=dict)
    """Layer type -> rank -> how many layers."""
    alphas: dict[str, dict[float, int]] = field(default_factory=dict)
    """Layer type -> alpha -> how many layers."""
    blocks: dict[str, list[int]] = field(default_factory=dict)
    """double_blocks, single_blocks -> numbers of adapted blocks."""
    norms: dict[str, float] = field(default_factory=dict)
    """Block -> Frobenius norm of what it adds to the weights."""
    split: bool = False
    """Do fused layers have separate factors for q, k and v?"""
    not_finite: tuple[str, ...] = ()
    """Tensors with NaN or infinity."""
    metadata: dict[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def as_record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class Check:
    """Is the file sound, and where does it load?"""

    path: str
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    verdict: Verdict

    @property
    def is_sound(self) -> bool:
        """No problem was found."""
        return not self.problems

    def as_record(self) -> dict[str, Any]:
        """JSON-ready values."""
        record = {"path": self.path, "sound": self.is_sound, "problems": list(self.problems), "notes": list(self.notes)}
        return record | {"verdict": self.verdict.as_record()}


def inspect(path: str | Path) -> Inspection:
    """Everything about an adapter file. Raises ModelFileError if it cannot be read or is no adapter."""
    with open_weights(path) as weights:
        found = _adapter(weights)
        state, problems = _state(weights, found)
        sizes = found.sizes
        return Inspection(
            path=str(path),
            kind=found.variant,
            format=found.key_style,
            bytes=sizes["bytes"],
            tensors=sizes["tensors"],
            dtypes=sizes["dtypes"],
            **(_figures(state) if state else {}),
            not_finite=_not_finite(weights),
            metadata=dict(weights.metadata),
            problems=tuple(problems),
        )


def check(path: str | Path, base: str | Path | None = None) -> Check:
    """Problems of an adapter file, alone or against the sizes of a base model (its header only), and the verdict of loaders.

    Raises ModelFileError if the file cannot be read at all, or `base` is no transformer.
    """
    with open_weights(path) as weights:
        found = _adapter(weights)
        state, problems = _state(weights, found)
        bad = _not_finite(weights)
        if bad:
            problems.append(f"{len(bad)} tensors are not finite, e.g. {bad[0]}")
        notes = list(found.notes)
        if state is not None:
            problems += _suspect(state)
            notes += _remarks(state)
            problems += _against(state, base) if base is not None else []
        return Check(str(path), tuple(problems), tuple(notes), verdict_of(weights))


def _adapter(weights: WeightsFile) -> Identity:
    found = identify(weights)
    if found.role != "lora":
        where = str(weights.paths[0])
        raise ModelFileError(f"this is {found.describe()}, an adapter was expected", where=where, fix="give an adapter file")
    return found


def _state(weights: WeightsFile, found: Identity) -> tuple[AdapterState | None, list[str]]:
    """The layers where the kind can be read, and what is wrong with them."""
    if found.unusable:
        return None, list(found.unusable)
    try:
        return read_open(weights), []
    except ModelFileError as error:
        return None, [problem.what + (f" ({problem.why})" if problem.why else "") for problem in error.problems]


def _figures(state: AdapterState) -> dict[str, Any]:
    ranks: dict[str, Counter[int]] = {}
    alphas: dict[str, Counter[float]] = {}
    norms: Counter[str] = Counter()
    for path, layer in state.layers.items():
        kind = layer_type(path) or "other"
        ranks.setdefault(kind, Counter())[layer.rank] += 1
        alphas.setdefault(kind, Counter())[layer.parts[0].alpha] += 1
        norms[block_of(path)] += (norm_of(layer) or 0.0) ** 2  # type: ignore[assignment]  # a Counter holds floats as well
    order = [*LAYER_TYPES, "other"]
    return {
        "roles": dict(Counter(path.split(".", 1)[0] for path in state.layers)),
        "ranks": {kind: dict(sorted(ranks[kind].items())) for kind in order if kind in ranks},
        "alphas": {kind: dict(sorted(alphas[kind].items())) for kind in order if kind in alphas},
        "blocks": {stack: _numbers(state, stack) for stack in ("double_blocks", "single_blocks")},
        "norms": {block: value**0.5 for block, value in norms.items() if value},
        "split": any(part.name for layer in state.layers.values() for part in layer.parts),
    }


def block_of(path: str) -> str:
    """`dit.double_blocks.3.img_attn.qkv` -> `double_blocks.3`; layers outside blocks are named by their model or themselves."""
    role, _, rest = path.partition(".")
    if role != "dit":
        return role
    words = rest.split(".")
    return ".".join(words[:2]) if "blocks" in words[0] else words[0]


def _numbers(state: AdapterState, stack: str) -> list[int]:
    prefix = f"dit.{stack}."
    return sorted({int(path[len(prefix) :].split(".", 1)[0]) for path in state.layers if path.startswith(prefix)})


def _not_finite(weights: WeightsFile) -> tuple[str, ...]:
    return tuple(name for name in weights if not _finite(weights.tensor(name)))


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all())


def _suspect(state: AdapterState) -> list[str]:
    problems = []
    zero = [path for path, layer in state.layers.items() if any(part.rank and part.alpha == 0 for part in layer.parts)]
    if zero:
        problems.append(f"{len(zero)} layers have alpha 0 and so no effect, e.g. {zero[0]}")
    large = {path: value for path, layer in state.layers.items() if (value := norm_of(layer) or 0.0) > HUGE}
    if large:
        path = max(large, key=lambda name: large[name])
        problems.append(f"{len(large)} layers change their weights by a norm above {HUGE:g}, up to {large[path]:.3g} at {path}")
    return problems


def _remarks(state: AdapterState) -> list[str]:
    idle = [path for path, layer in state.layers.items() if norm_of(layer) == 0]
    return [f"{len(idle)} of {len(state.layers)} layers are zero, e.g. {idle[0]}"] if idle else []


def _against(state: AdapterState, base: str | Path) -> list[str]:
    """Layers that the base lacks or has in another size; models that the base file does not hold are left out."""
    shapes: dict[str, tuple[int, ...]] = {}
    with open_scaled(base) as weights:
        found = identify(weights)
        if not {"dit", "clip_l", "t5xxl"} & set(found.roles()):
            require_role(base, "dit")
        for role in found.roles():
            if role in ("dit", "clip_l", "t5xxl"):
                shapes |= {f"{role}.{key}": source.shape for key, source in canonical(weights, found, role).items()}
    roles = {key.split(".", 1)[0] for key in shapes}
    problems = [text for path, layer in state.layers.items() if path.split(".", 1)[0] in roles and (text := _misfit(path, layer, shapes))]
    return [*problems[:5], f"and {len(problems) - 5} more layers that do not fit"] if len(problems) > 5 else problems


def _misfit(path: str, layer: LayerState, shapes: Mapping[str, tuple[int, ...]]) -> str:
    shape = shapes.get(f"{path}.weight")
    if shape is None:
        return f"the base has no layer {path}"
    height = max(part.stop for part in layer.parts)
    fits = layer.in_features in (None, shape[1]) and (height == shape[0] if layer.out_features else height <= shape[0])
    return "" if fits else f"{path} is {height} x {layer.in_features} here and {shape[0]} x {shape[1]} in the base"
