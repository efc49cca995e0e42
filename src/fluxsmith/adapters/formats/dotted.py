"""Reading and writing shared by the formats whose layer names are dotted: entries of a file in, keys of a naming out.

A format gives the naming and the style; alphas come from the tensors, else from the header, else alpha = rank.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from fluxsmith.adapters.formats.entries import Entry, entries, grouped, in_bfl_order, layers_from
from fluxsmith.adapters.formats.kinds import ANY
from fluxsmith.adapters.formats.naming import Found
from fluxsmith.adapters.formats.state import AdapterState, Part
from fluxsmith.adapters.formats.suffixes import Style, alpha, keys
from fluxsmith.errors import ModelFileError

Alphas = Callable[[Entry], float | None]


def read_layers(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    find: Callable[[str], Found | None],
    *,
    name: str,
    alphas: Alphas = lambda _: None,
) -> AdapterState:
    """Tensors of a file -> layers. Raises ModelFileError for names, kinds and sizes that do not fit."""
    items = []
    for group in grouped(tensors).values():
        found = find(group.name)
        for item in entries(group, found.place if found else None):
            if found and found.table:
                item = in_bfl_order(item, found.table)
            items.append(item if item.alpha is not None else item._replace(alpha=alphas(item)))
    return AdapterState(layers_from(items), dict(metadata), name)


def written(
    named: Iterable[tuple[str, Part]], style: Style, dtype: torch.dtype | None, *, folds: bool
) -> dict[str, Tensor]:  # fmt: skip
    """Keys of named parts. `folds`: a LoRA's strength goes into up and no alpha is written (loaders then take alpha = rank)."""
    made: dict[str, Tensor] = {}
    for name, part in named:
        if folds and part.kind == "lora":
            made |= keys(folded(part), name, style, dtype)
        else:
            made |= keys(part, name, style, dtype)
            if part.kind not in ("full", "ia3"):
                made[f"{name}.alpha"] = alpha(part)
    return made


def folded(part: Part) -> Part:
    """The same LoRA with strength 1 (alpha = rank): the factor goes into up."""
    if part.scale == 1:
        return part
    return part.having(tensors={**part.tensors, "up": part.up * part.scale}, alpha=float(part.rank))


def only_lora(state: AdapterState, target: str, *, dora: bool = False, bias: bool = False) -> None:
    """Refuse other kinds by name; `dora` and `bias` say what else the target holds. Raises ModelFileError."""
    allowed = {"down", "up", *(["magnitude"] if dora else []), *(["bias"] if bias else [])}
    for path, layer in state.layers.items():
        if any(part.kind != "lora" or not set(part.tensors) <= allowed for part in layer.parts):
            kinds = sorted({part.kind for part in layer.parts} | {key for part in layer.parts for key in part.tensors if key in ANY})
            what = f"{target} holds {'LoRA and DoRA over LoRA' if dora else 'plain LoRA'} only, {path} is {' with '.join(kinds)}"
            raise ModelFileError(what, fix="extract a LoRA from it (an approximation by SVD), or choose another format")
        if any("magnitude" in part.tensors and part.tensors["magnitude"].shape[1] != 1 for part in layer.parts):
            raise ModelFileError(f"{target} has DoRA with norms per output only, {path} has norms per input")


def no_replacements(state: AdapterState, target: str) -> None:
    """Refuse whole parameters (norm scales of a control LoRA). Raises ModelFileError."""
    if state.replaced:
        first = next(iter(state.replaced))
        raise ModelFileError(f"{target} has no place for whole parameters such as {first}", fix='use format "bfl_control"')


def only_transformer(state: AdapterState, target: str) -> None:
    """Refuse text encoders. Raises ModelFileError."""
    others = [path for path in state.layers if not path.startswith("dit.")]
    if others:
        raise ModelFileError(f"{target} has no names for text encoders ({others[0]})", fix='use format "kohya" or "peft"')
