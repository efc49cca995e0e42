"""From an adapter file's content to adapters on the loaded models, for any kind, and what a layer adds to its weight.

`adapters = load_adapter("cats.safetensors", models, strength=0.8)`; `delta_of(path, layer, weight)` for tools that merge or extract.
A part of kind "lokr" is built by `adapters/lokr.py`: the file name is the kind.
"""

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from fluxsmith.adapters.additive import RULES
from fluxsmith.adapters.base import AdapterSet, linear_layers, unknown_layers
from fluxsmith.adapters.formats.files import read_adapter
from fluxsmith.adapters.formats.kinds import ADDITIVE, KINDS
from fluxsmith.adapters.formats.state import AdapterState, LayerState, Part
from fluxsmith.adapters.rows import LayerAdapter, PartModule
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.models.linear import Linear

WIDENED = "dit.img_in"  # the one layer that control LoRAs give more inputs


def part_module(part: Part) -> PartModule:
    """The module of one part, with copies of its tensors. Raises ModelFileError for a kind that no file of this folder knows."""
    if part.kind not in KINDS:
        raise ModelFileError(f"there is no adapter kind {part.kind}")
    module: type[PartModule] = import_module(f"fluxsmith.adapters.{part.kind}").PART
    return module(part)


def from_state(state: AdapterState, bases: Mapping[str, Linear], *, name: str = "adapter") -> AdapterSet:
    """Adapters exactly as a file holds them, not attached. Raises ModelFileError for layers that the models lack or of other size."""
    unknown = [path for path in state.layers if path not in bases]
    if unknown:
        raise unknown_layers(unknown, "the model has no such layers")
    adapters, widened = {}, {}
    for path, layer in state.layers.items():
        base = bases[path]
        if path == WIDENED and state.format == "bfl_control" and (layer.in_features or 0) > base.in_features:
            widened[path] = layer.in_features or 0
        adapters[path] = _from_layer(path, layer, base, widened.get(path, base.in_features))
    return AdapterSet(bases, adapters, name=name, replaced=state.replaced, widened=widened)


def _from_layer(path: str, layer: LayerState, base: Linear, in_features: int) -> LayerAdapter:
    fits = layer.in_features in (None, in_features) and layer.out_features in (None, base.out_features)
    if not fits or max(part.stop for part in layer.parts) > base.out_features:
        why = f"{layer.out_features or '?'} x {layer.in_features or '?'} against {base.out_features} x {in_features}"
        raise ModelFileError(f"the adapter is for a model of another size at {path}", why=why, fix="use it with its own base model")
    parts = [part_module(_placed(part, base)).float() for part in layer.parts]
    made, device = LayerAdapter(parts, base.out_features), base.weight.device
    return made if device.type == "meta" else made.to(device)  # a layer that visits the device has no weight now; its part brings them


def _placed(part: Part, base: Linear) -> Part:
    """Rows that the file could not tell: (IA)3 on the inputs of a whole layer is about all of them."""
    if part.rows:
        return part
    if part.name:
        raise ModelFileError(f"the rows of part {part.name} cannot be told from this file")
    return part.having(stop=base.out_features)


def load_adapter(
    path: Path | str, models: Mapping[str, nn.Module], *, strength: float = 1.0, name: str = "adapter", dora_rule: str | None = None
) -> AdapterSet:  # fmt: skip
    """Read a file in any known format and attach it to the loaded models, for inference.

    `dora_rule` says what a strength does to DoRA (`lycoris`, `interpolated`, `peft`); by default as the file's maker does.
    Raises ModelFileError that names the file.
    """
    state = read_adapter(path)
    if dora_rule is not None:
        state = with_rule(state, dora_rule)
    try:
        made = from_state(state, linear_layers(models), name=name)
    except ModelFileError as error:
        problem = error.problems[0]
        raise ModelFileError(problem.what, where=str(path), why=problem.why, fix=problem.fix) from error
    made.scale(strength)
    made.attach(models)
    for adapter in made.modules:
        adapter.requires_grad_(False).eval()
    return made


def with_rule(state: AdapterState, rule: str) -> AdapterState:
    """The same with another DoRA rule. Raises ConfigError for an unknown one."""
    if rule not in RULES:
        raise ConfigError(f"there is no DoRA rule {rule!r}", fix=f"use one of {', '.join(RULES)}")
    layers = {
        path: replace(layer, parts=tuple(part.having(rule=rule) if "magnitude" in part.tensors else part for part in layer.parts))
        for path, layer in state.layers.items()
    }
    return replace(state, layers=layers)


@torch.no_grad()
def delta_of(path: str, layer: LayerState, weight: Tensor, *, strength: float = 1.0) -> Tensor:
    """What a layer of a file adds to its weight (out, in), float32, for every kind. Raises ModelFileError if the sizes differ."""
    base = Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(weight.float(), requires_grad=False)
    adapter = _from_layer(path, layer, base, weight.shape[1])
    adapter.bind(base)
    adapter.strength.fill_(strength)
    return adapter.delta(base.weight)


@torch.no_grad()
def norm_of(layer: LayerState) -> float | None:
    """Frobenius norm of what a layer adds at strength 1; None for kinds that need the base weight for it."""
    total = 0.0
    for part in layer.parts:
        if "magnitude" in part.tensors or part.kind not in (*ADDITIVE, "full"):
            return None
        module = part_module(part.having(tensors={name: tensor.double() for name, tensor in part.tensors.items()}))
        own = module.norm() if part.kind == "lora" else None
        total += (float(module.delta(torch.empty(0), 1.0).norm()) if own is None else own) ** 2
    return total**0.5
