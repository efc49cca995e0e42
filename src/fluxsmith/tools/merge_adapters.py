"""Adapters merged with each other: the file does what all of them do at their strengths, each counted exactly once.

`merge_adapters(AdapterMergeRequest((("a.safetensors", 0.7), ("b.safetensors", 0.3)), Path("ab.safetensors")))`. LoRAs are joined side
by side, which is exact; `rank` cuts the sum down by SVD; `full` writes the sum itself, which holds every kind.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fluxsmith.adapters.formats.files import write_adapter
from fluxsmith.adapters.formats.fused import fuse
from fluxsmith.adapters.formats.state import AdapterState, LayerState, Part, lora_part
from fluxsmith.errors import ConfigError, FluxsmithError, ModelFileError
from fluxsmith.io.durable import Disk
from fluxsmith.tools.adapter_file import adapter, format_named, format_of, rewritten, widest
from fluxsmith.tools.layer_merge import Weighted, adds_only, merged_weight
from fluxsmith.tools.low_rank import Ranks, Svd, svd_of, svd_of_product, weighted_left
from fluxsmith.tools.model_file import Given, ModelFile, model_file
from fluxsmith.tools.outputs import dtype_of, make_room, target_path

Progress = Callable[[int, int, str], None]
How = Literal["exact", "svd", "full"]


@dataclass(frozen=True)
class AdapterMergeRequest:
    """Which adapters, and what to make of them."""

    adapters: tuple[tuple[Given, float], ...]
    target: Path
    how: How = "exact"
    """exact: LoRAs side by side, ranks add up. svd: the nearest LoRA of `rank`. full: the sum of the differences, not factored."""
    rank: int | None = None
    """For svd; None is the largest rank among the adapters, layer by layer."""
    base: Given | None = None
    """The model they are for: needed for sizes that files do not tell, and for kinds that depend on its weights (DoRA, OFT, ...)."""
    format: str | None = None
    """None is that of the first file."""
    dtype: str = "keep"
    """keep is the most precise one among the files."""
    has_metadata: bool = True
    device: str = "cpu"
    overwrite: bool = False


@dataclass(frozen=True)
class AdapterMergeReport:
    """What was written. `residual`: largest share of a layer's squares that svd lost; 0 for the exact ways."""

    target: str
    layers: int
    ranks: dict[int, int]
    """Rank -> layers."""
    residual: float
    verdict: str

    def as_record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def _module(how: How, states: Sequence[AdapterState]) -> dict[str, str]:
    """The kind of adapter as sd-scripts says it, if that is another than the first file's."""
    if "ss_network_module" not in states[0].metadata or how == "exact":
        return {}
    module, kind = ("networks.lora_flux", "{}") if how == "svd" else ("lycoris.kohya", '{"algo": "full"}')
    return {"ss_network_module": module, "ss_network_args": kind}


class Share(NamedTuple):
    """What one adapter has for a layer."""

    item: Weighted
    layer: LayerState


def merge_adapters(request: AdapterMergeRequest, progress: Progress = lambda *_: None, *, disk: Disk | None = None) -> AdapterMergeReport:
    """Write the merged adapter. Raises ModelFileError with the reason where there is no such form, ConfigError, StorageError."""
    disk = disk or Disk()
    if not request.adapters:
        raise ConfigError("no adapter is given", fix="give two or more")
    if request.rank is not None and (request.rank < 1 or request.how != "svd"):
        raise ConfigError(f"rank {request.rank} with {request.how}", fix='give a rank of at least 1, with how = "svd"')
    target, wanted = target_path(request.target, overwrite=request.overwrite), dtype_of(request.dtype)
    items = [Weighted(adapter(path, request.base), strength, str(path)) for path, strength in request.adapters]
    states = [item.state for item in items]
    form = format_named(request.format) if request.format else format_of(states[0])
    dtype = wanted or widest(states)
    layers: dict[str, LayerState] = {}
    worst = 0.0
    with ExitStack() as files:
        making = _Making(request, files)
        paths = list(dict.fromkeys(path for state in states for path in state.layers))
        for number, path in enumerate(paths):
            progress(number, len(paths), path)
            shares = [Share(item, item.state.layers[path]) for item in items if path in item.state.layers]
            layers[path], lost = making.layer(path, shares)
            worst = max(worst, lost)
    state = AdapterState(layers, states[0].metadata, replaced=_replaced(items))
    chain = " + ".join(f"{Path(path).name} x {strength:g}" for path, strength in request.adapters)
    entries = _module(request.how, states) | {"modelspec.title": target.stem, "modelspec.merged_from": chain, "ss_output_name": target.stem}
    metadata = rewritten(state, form, entries) if request.has_metadata else {}
    make_room(target, disk)
    verdict = write_adapter(target, state, format=form, dtype=dtype, metadata=metadata, disk=disk)
    ranks = [layer.rank for layer in layers.values()]
    return AdapterMergeReport(str(target), len(layers), {rank: ranks.count(rank) for rank in sorted(set(ranks))}, worst, verdict.text)


class _Making:
    """Layers one after the other; the base is opened when it is first needed."""

    def __init__(self, request: AdapterMergeRequest, files: ExitStack) -> None:
        self.request, self.files = request, files
        self.open: dict[str, ModelFile] = {}

    def layer(self, path: str, shares: Sequence[Share]) -> tuple[LayerState, float]:
        """The merged layer and the share that it lost."""
        if self.request.how == "full":
            return with_bias(whole(self.sum(path, shares), kind="full"), shares), 0.0
        factors = joined(path, shares)
        if self.request.how == "svd":
            return self._cut(path, shares, factors)
        if factors is not None:
            return factors, 0.0
        if len(shares) == 1 and (stronger := _stronger(shares[0])) is not None:
            return stronger, 0.0
        kinds = " and ".join(dict.fromkeys(share.layer.kind for share in shares))
        strengths = "" if len(shares) > 1 else f" at strength {shares[0].item.strength:g}"
        raise ModelFileError(
            f"{path}: {kinds}{strengths} have no exact sum as one adapter",
            where=shares[-1].item.name,
            fix="give --rank N for the nearest LoRA, --full for the difference itself, or merge them into the model",
        )

    def _cut(self, path: str, shares: Sequence[Share], factors: LayerState | None) -> tuple[LayerState, float]:
        rank = self.request.rank or max(share.layer.rank for share in shares) or 1
        device = self.request.device
        if factors is not None and all(part.kind == "lora" for part in factors.parts):
            part = fuse(factors, path)
            found = svd_of_product(part.up.to(device) * part.scale, part.down.to(device))
            total = float(found.values.double().square().sum())
        else:
            delta = self.sum(path, shares).to(device)
            found, total = svd_of(delta, Ranks(number=rank)), float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
        kept = found.first(min(rank, len(found.values)))
        lost = 1 - float(kept.values.double().square().sum()) / total if total else 0.0
        return with_bias(lora_of(kept), shares), max(lost, 0.0)

    def sum(self, path: str, shares: Sequence[Share]) -> Tensor:
        """What all of them change (out, in), fp32."""
        height = next((layer.out_features for _, layer in shares if layer.out_features is not None), None)
        width = next((layer.in_features for _, layer in shares if layer.in_features is not None), None)
        if height is not None and width is not None and all(adds_only(layer) for _, layer in shares):
            return merged_weight(path, shares, torch.zeros(height, width))
        if self.request.base is None:
            item, layer = next((share for share in shares if not adds_only(share.layer)), shares[0])
            why = f"what {layer.kind} adds depends on the weight it is for" if not adds_only(layer) else "the file does not tell its size"
            raise ModelFileError(f"{path} cannot be merged without the base model", where=item.name, why=why, fix="give --base MODEL")
        weight = self._weight(path)
        return merged_weight(path, shares, weight.clone()) - weight

    def _weight(self, path: str) -> Tensor:
        role, _, name = path.partition(".")
        if self.request.base is None:
            raise ValueError("no base")
        if role not in self.open:
            self.open[role] = self.files.enter_context(model_file(self.request.base, role))
        return self.open[role].read(f"{name}.weight").float()


def joined(path: str, shares: Sequence[Share]) -> LayerState | None:
    """LoRAs side by side: downs stacked, ups next to each other with strength and alpha / rank in them, alpha = rank. None for other kinds.

    Layers that all have the same parts (q, k, v) stay in parts; else each is made whole first.
    """
    if not all(part.kind == "lora" and "magnitude" not in part.tensors for share in shares for part in share.layer.parts):
        return None
    spans = {tuple((part.name, part.start, part.stop) for part in share.layer.parts) for share in shares}
    if len(spans) == 1:
        groups = [[share.layer.parts[number] for share in shares] for number in range(len(shares[0].layer.parts))]
        height = next((share.layer.out_features for share in shares if share.layer.out_features is not None), None)
    else:
        height = next((share.layer.out_features for share in shares if share.layer.out_features is not None), None)
        groups = [[_whole(path, share, height) for share in shares]]
    parts = tuple(_side_by_side(group, [share.item.strength for share in shares]) for group in groups)
    return LayerState(parts, height if len(spans) == 1 else parts[0].stop)


def _whole(path: str, share: Share, height: int | None) -> Part:
    layer = share.layer if share.layer.out_features is not None else LayerState(share.layer.parts, height, share.layer.in_features)
    try:
        return fuse(layer, path)
    except FluxsmithError as error:
        problem = error.problems[0]
        raise ModelFileError(problem.what, where=share.item.name, why=problem.why, fix="give --base MODEL") from error


def _side_by_side(parts: Sequence[Part], strengths: Sequence[float]) -> Part:
    first = parts[0]
    if len({(part.stop - part.start, part.down.shape[1]) for part in parts}) > 1:
        raise ModelFileError("the adapters are for models of different sizes", fix="merge adapters of one base model")
    down = torch.cat([part.down for part in parts])
    factors = [part.scale * strength for part, strength in zip(parts, strengths, strict=True)]
    if len(set(factors)) == 1:  # the factors stay as they are, to the bit
        ups, factor = [-part.up if factors[0] < 0 else part.up for part in parts], abs(factors[0])
        made = lora_part(first.name, first.start, first.stop, down, torch.cat(ups, dim=1), factor * len(down))
    else:
        up = torch.cat([part.up.float() * factor for part, factor in zip(parts, factors, strict=True)], dim=1)
        made = lora_part(first.name, first.start, first.stop, down, up, float(len(down)))
    biases = [part.tensors["bias"].float() * s for part, s in zip(parts, strengths, strict=True) if "bias" in part.tensors]
    return made if not biases else made.having(tensors={**made.tensors, "bias": sum(biases[1:], biases[0])})


def _stronger(share: Share) -> LayerState | None:
    """One adapter's layer at a strength, where its kind can say that: alpha for kinds with a rank, the matrix of a full difference."""
    strength, layer = share.item.strength, share.layer
    if strength == 1:
        return layer
    if not adds_only(layer):
        return None
    parts = []
    for own in layer.parts:
        bias = {"bias": own.tensors["bias"].float() * strength} if "bias" in own.tensors else {}
        part = own.having(tensors={**own.tensors, **bias})
        if part.kind == "full":
            parts.append(part.having(tensors={**part.tensors, "diff": part.tensors["diff"].float() * strength}))
        elif part.rank:
            parts.append(part.having(alpha=part.alpha * strength))
        else:
            return None
    return LayerState(tuple(parts), layer.out_features, layer.in_features)


def lora_of(found: Svd) -> LayerState:
    """A whole LoRA with alpha = rank."""
    up, down = weighted_left(found)
    part = lora_part("", 0, up.shape[0], down.cpu().contiguous(), up.cpu().contiguous(), float(up.shape[1]))
    return LayerState((part,), up.shape[0])


def whole(delta: Tensor, *, kind: str) -> LayerState:
    """A full difference."""
    return LayerState((Part("", 0, delta.shape[0], kind, {"diff": delta.cpu()}, 1.0),), *delta.shape)


def with_bias(layer: LayerState, shares: Sequence[Share]) -> LayerState:
    """The whole layer with the sum of what the adapters add to its bias."""
    changes = [(part, item.strength) for item, own in shares for part in own.parts if "bias" in part.tensors]
    if not changes:
        return layer
    part = layer.parts[0]
    bias = torch.zeros(part.rows)
    for other, strength in changes:
        bias[other.start : other.stop] += strength * other.tensors["bias"].float()
    return LayerState((part.having(tensors={**part.tensors, "bias": bias}),), layer.out_features, layer.in_features)


def _replaced(items: Sequence[Weighted]) -> dict[str, Tensor]:
    """Whole parameters that control LoRAs bring along."""
    made: dict[str, Tensor] = {}
    for item in items:
        for path, value in item.state.replaced.items():
            if path in made and not torch.equal(made[path], value):
                raise ModelFileError(
                    f"two adapters put different values in place of {path}", where=item.name, fix="merge them into the model"
                )
            made[path] = value
    return made
