"""Parts of fused layers (q, k, v, mlp) and whole layers: cutting, joining and turning rows round, exactly or not at all.

`fuse(layer)` is one part for the whole layer; `cut(part, names, bounds)` is its parts. Each refuses, with the reason, what has no
exact form in that kind of adapter.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fluxsmith.adapters.formats.state import LayerState, Part, lora_part
from fluxsmith.errors import ModelFileError

BY_ROWS = {  # kind -> tensors whose first axis runs over output rows; the others belong to all rows
    "lora": ("up",),
    "loha": ("w1_a", "w2_a"),
    "glora": ("b1",),
    "full": ("diff",),
    "ia3": ("weight",),
}


def take(part: Part, spans: Sequence[tuple[int, int]], where: str) -> Part:
    """The part of the given spans of rows (counted from its own start), in that order. Raises ModelFileError if there is none."""
    tensors = dict(part.tensors)
    magnitude = tensors.get("magnitude")
    if part.kind == "lokr":
        tensors |= _kronecker_rows(part, spans, where)
    elif part.kind == "ia3" and bool(tensors["on_input"].item()):
        raise ModelFileError(f"{where}: (IA)3 on inputs acts on all rows of a layer", fix="keep the layer whole")
    elif part.kind in BY_ROWS:
        tensors |= {name: _rows(tensors[name], spans) for name in BY_ROWS[part.kind]}
    elif part.kind == "diag_oft":
        tensors["blocks"] = _block_rows(part, spans, where)
    else:
        raise ModelFileError(f"{where}: the rotation of a {part.kind} mixes rows", fix="keep the layer whole")
    if magnitude is not None:
        if magnitude.shape[0] != part.rows:
            raise ModelFileError(f"{where}: DoRA with norms per input needs all rows of a layer", fix="keep the layer whole")
        tensors["magnitude"] = _rows(magnitude, spans)
    for name in ("bias", "rescale"):
        if name in tensors:
            tensors[name] = _rows(tensors[name], spans)
    return part.having(tensors=tensors)


def _rows(tensor: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    return torch.cat([tensor[start:stop] for start, stop in spans]) if len(spans) > 1 else tensor[slice(*spans[0])]


def _kronecker_rows(part: Part, spans: Sequence[tuple[int, int]], where: str) -> dict[str, Tensor]:
    """Rows of w1 (x) w2 are those of w1, each as often as w2 has rows."""
    left = "w1" if "w1" in part.tensors else "w1_a"
    inner = part.rows // part.tensors[left].shape[0]
    return {left: _rows(part.tensors[left], _aligned(spans, inner, part, where))}


def _block_rows(part: Part, spans: Sequence[tuple[int, int]], where: str) -> Tensor:
    if float(part.alpha):
        raise ModelFileError(f"{where}: the constraint of a Diag-OFT goes over all its blocks", fix="keep the layer whole")
    return _rows(part.tensors["blocks"], _aligned(spans, part.tensors["blocks"].shape[-1], part, where))


def _aligned(spans: Sequence[tuple[int, int]], step: int, part: Part, where: str) -> list[tuple[int, int]]:
    if any(edge % step for span in spans for edge in span):
        raise ModelFileError(
            f"{where}: the blocks of {step} rows of this {part.kind} go over the borders of q, k and v", fix="keep it whole"
        )
    return [(start // step, stop // step) for start, stop in spans]


def swapped(part: Part, where: str) -> Part:
    """Second half of the rows first: (shift, scale) <-> (scale, shift)."""
    half = part.rows // 2
    return take(part, [(half, part.rows), (0, half)], where)


def cut(part: Part, names: Sequence[str], bounds: Sequence[int], where: str) -> list[Part]:
    """A whole fused layer as its parts, with exactly the same effect. `bounds` are the first rows of the parts and the end.

    Factors that were stacked from parts (block-diagonal) come apart again; others share what belongs to all rows.
    """
    spans = list(pairwise(bounds))
    stacked = _unstacked(part, spans)
    made = stacked or [take(part, [span], where) for span in spans]
    return [own.having(name=name, start=a, stop=b) for own, name, (a, b) in zip(made, names, spans, strict=True)]


def _unstacked(part: Part, spans: Sequence[tuple[int, int]]) -> list[Part] | None:
    """The pairs that `fuse` stacked, if up is block-diagonal with equal ranks."""
    if not part.is_plain_lora or part.rank % len(spans) or part.rank < len(spans):
        return None
    rank, made = part.rank // len(spans), []
    for number, (start, stop) in enumerate(spans):
        columns = slice(number * rank, (number + 1) * rank)
        up = part.up[start:stop]
        if up[:, : columns.start].any() or up[:, columns.stop :].any() or not up[:, columns].any():
            return None
        alpha = part.alpha / len(spans)
        made.append(part.having(tensors={"down": part.down[columns], "up": up[:, columns]}, alpha=alpha))
    return made


def fuse(layer: LayerState, where: str = "the layer") -> Part:
    """One part for the whole layer with exactly the same effect.

    LoRA: downs stacked, ups block-diagonal; alpha is chosen so that alpha / (sum of ranks) is the common strength, and differing
    strengths go into the up factor. Raises ModelFileError for kinds that have no such form.
    """
    first = layer.parts[0]
    if len(layer.parts) == 1 and not first.name:
        return first
    kinds = {part.kind for part in layer.parts}
    if len(kinds) > 1 or first.kind not in ("lora", "full", "ia3"):
        what = f"{where} has separate {layer.kind} factors for {', '.join(part.name for part in layer.parts)}"
        raise ModelFileError(f"{what}, which have no exact form as one layer", fix="keep names that know q, k and v, or extract a LoRA")
    height = _whole_height(layer, where)
    extra = _joined_extras(layer, height, where)
    if first.kind == "lora":
        whole = _stacked(layer, height)
        return whole.having(tensors={**whole.tensors, **extra}, rule=first.rule)
    name = "diff" if first.kind == "full" else "weight"
    joined = first.tensors[name].new_zeros(height, *first.tensors[name].shape[1:])
    for part in layer.parts:
        joined[part.start : part.stop] = part.tensors[name]
    return first.having(name="", start=0, stop=height, tensors={**first.tensors, **extra, name: joined})


def _whole_height(layer: LayerState, where: str) -> int:
    if any("on_input" in part.tensors and bool(part.tensors["on_input"].item()) for part in layer.parts):
        raise ModelFileError(f"{where} has separate (IA)3 vectors on inputs, which have no exact form as one layer")
    return layer.height()


def _joined_extras(layer: LayerState, height: int, where: str) -> dict[str, Tensor]:
    """Bias (absent is zero) and magnitude (must be there for all rows)."""
    made: dict[str, Tensor] = {}
    biases = [part for part in layer.parts if "bias" in part.tensors]
    if biases:
        made["bias"] = biases[0].tensors["bias"].new_zeros(height)
        for part in biases:
            made["bias"][part.start : part.stop] = part.tensors["bias"]
    magnitudes = [part.tensors["magnitude"] for part in layer.parts if "magnitude" in part.tensors]
    if not magnitudes:
        return made
    rows = sum(part.rows for part in layer.parts)
    if len(magnitudes) < len(layer.parts) or rows != height or any(tensor.shape[1] != 1 for tensor in magnitudes):
        raise ModelFileError(f"{where} has separate DoRA magnitudes that do not make one layer", fix="keep names that know q, k and v")
    return {**made, "magnitude": torch.cat(magnitudes)}


def _stacked(layer: LayerState, height: int) -> Part:
    total = sum(part.rank for part in layer.parts)
    scales = {part.scale for part in layer.parts}
    common = scales.pop() if len(scales) == 1 else None
    up = layer.parts[0].up.new_zeros(height, total)
    column = 0
    for part in layer.parts:
        up[part.start : part.stop, column : column + part.rank] = part.up if common is not None else part.up * part.scale
        column += part.rank
    down = torch.cat([part.down for part in layer.parts])
    return lora_part("", 0, height, down, up, total * (1.0 if common is None else common))


def unsplit(layer: LayerState, names: tuple[str, ...]) -> LayerState:
    """Parts that share one down factor (as converted fused layers do) become one whole part again, without loss."""
    parts, first = layer.parts, layer.parts[0]
    have = set(first.tensors)
    if tuple(part.name for part in parts) != names or not {"down", "up"} <= have:
        return layer
    if any(set(part.tensors) != have or part.rule != first.rule or not torch.equal(part.down, first.down) for part in parts):
        return layer
    if "magnitude" in have and any(part.tensors["magnitude"].shape[1] != 1 for part in parts):
        return layer
    up = torch.cat([part.up if part.scale == first.scale else part.up * (part.scale / first.scale) for part in parts])
    extra = {name: torch.cat([part.tensors[name] for part in parts]) for name in have - {"down", "up"}}
    whole = first.having(name="", start=0, stop=up.shape[0], tensors={"down": first.down, "up": up, **extra})
    return LayerState((whole,), up.shape[0], layer.in_features)


def bounds_of(names: Sequence[str], part: Part, in_features: int) -> list[int]:
    """Bounds of the parts of a whole fused layer: q, k, v as wide as its input, mlp the rest."""
    bounds = [index * in_features for index in range(len(names))]
    return [*bounds, part.rows]
