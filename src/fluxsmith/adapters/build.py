"""From an adapter's config to attached adapters: targets, fresh or loaded tensors, learning-rate groups. Shared by all kinds.

`build(config, models, start, seed=1)`, where `start(target, base, seed)` is the kind's fresh `Part` of one target.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fluxsmith.adapters.base import AdapterSet, layers_of, linear_layers
from fluxsmith.adapters.formats.files import read_adapter
from fluxsmith.adapters.formats.state import AdapterState, Part
from fluxsmith.adapters.load import from_state, part_module
from fluxsmith.adapters.rows import LayerAdapter, part_modules
from fluxsmith.adapters.targets import Target, last_match, select
from fluxsmith.config.adapter import AdapterConfig
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.models.linear import Linear

Start = Callable[[Target, Linear, int], Part]


def build(
    config: AdapterConfig, models: Mapping[str, nn.Module], start: Start, *, seed: int, dtype: torch.dtype | None, split: bool = False
) -> AdapterSet:  # fmt: skip
    """The adapters for the loaded models, attached, in train mode, with learning-rate groups; tensors in `dtype` (float32).

    Raises ConfigError for targets that hit nothing, and ModelFileError or ConfigError, naming the file, for a starting file that
    does not fit.
    """
    bases = {path: base for path, base in linear_layers(models).items() if path.split(".", 1)[0] in ("dit", *config.text_encoders)}
    if config.init_from is None and config.rank_from_file:
        raise ConfigError("adapter.rank_from_file needs a file", fix="add adapter.init_from, or remove adapter.rank_from_file")
    if config.init_from is None:
        made = _fresh(config, bases, start, seed, split=split)
    else:
        made = _from_file(config, config.init_from, bases, lambda: _fresh(config, bases, start, seed, split=split))
    for adapter in made.adapters.values():
        if isinstance(adapter, LayerAdapter):
            adapter.module_dropout = config.module_dropout
        for param in adapter.parameters():
            param.data = param.data.to(dtype or torch.float32)
        adapter.train()
    made.group_by(lambda path, short: group_of(config, path, short))
    made.attach()
    return made


def group_of(config: AdapterConfig, path: str, short: str) -> tuple[str, float | None, float]:
    """Name, rate and factor of a tensor's group: the role's rate, the last pattern that hits, LoRA+ for the up factors."""
    role, part = path.split(".", 1)[0], short.rpartition(".")[0]
    role_lr = {"dit": config.dit_lr, "clip_l": config.clip_l_lr, "t5xxl": config.t5xxl_lr}[role]
    lr = last_match(config.lr_by_pattern, f"{path}:{part}" if part else path, role_lr)
    name = role if lr == role_lr else f"{role} lr {lr:g}"
    ratio = config.plus_ratio(role)
    if ratio != 1 and short.rpartition(".")[2] == "up":
        return f"{name} up", lr, ratio
    return name, lr, 1.0


def _fresh(config: AdapterConfig, bases: Mapping[str, Linear], start: Start, seed: int, *, split: bool) -> AdapterSet:
    by_layer: dict[str, list[Part]] = {}
    for target in select(config, layers_of(bases), split=split):
        by_layer.setdefault(target.layer.path, []).append(start(target, bases[target.layer.path], seed))
    adapters = {}
    for path, parts in by_layer.items():
        base = bases[path]
        adapters[path] = LayerAdapter([part_module(part) for part in parts], base.out_features).to(base.weight.device)
    return AdapterSet(bases, adapters)


def _from_file(config: AdapterConfig, path: Path, bases: Mapping[str, Linear], fresh: Callable[[], AdapterSet]) -> AdapterSet:
    state = _wanted(config, path, read_adapter(path), bases)
    try:
        if config.rank_from_file:
            _check_kinds(config, path, state)
            return from_state(state, bases)
        made = fresh()
        if config.init_unused == "ignore":
            state = replace(state, layers={name: layer for name, layer in state.layers.items() if name in made.adapters})
        _check_ranks(config, made, state)
        made.load(state)
    except ModelFileError as error:
        problem = error.problems[0]
        fix = problem.fix or "start from a file that fits, or widen the targets"
        raise ModelFileError(problem.what, where=f"adapter.init_from = {path}", why=problem.why, fix=fix) from error
    return made


def _wanted(config: AdapterConfig, path: Path, state: AdapterState, bases: Mapping[str, Linear]) -> AdapterState:
    """The file's layers of the adapted models; layers of a text encoder that is not adapted are refused, or left out."""
    if state.replaced:
        first = next(iter(state.replaced))
        raise ConfigError(f"adapter.init_from = {path}: it replaces whole parameters ({first}), which are not trained")
    others = {role for role in state.roles() if role not in ("dit", *config.text_encoders)}
    if not others:
        return state
    if config.init_unused == "error":
        fix = f'set adapter.text_encoders = ["{sorted(others)[0]}"], or adapter.init_unused = "ignore"'
        raise ConfigError(f"adapter.init_from = {path}: it has layers of {', '.join(sorted(others))}, which are not adapted", fix=fix)
    return replace(state, layers={name: layer for name, layer in state.layers.items() if name.split(".", 1)[0] not in others})


def _check_kinds(config: AdapterConfig, path: Path, state: AdapterState) -> None:
    others = [kind for kind in state.kinds() if config.type and kind != config.type and config.type not in kind.split("+")]
    decomposed = {layer.parts[0].kind for layer in state.layers.values() if layer.kind == "dora"}
    if others and not (others == ["dora"] and decomposed == {config.type}):
        raise ConfigError(f"adapter.init_from = {path}: it is a {', '.join(others)}", fix=f'set adapter.type = "{others[0]}"')


def _check_ranks(config: AdapterConfig, made: AdapterSet, start: AdapterState) -> None:
    """A starting file whose ranks differ from the config is refused with the value that fits."""
    for path, layer in start.layers.items():
        own = {part.name: part for part in part_modules(made, path)}
        for part in layer.parts:
            mine = own.get(part.name)
            if mine is None or part.kind != "lora" or mine.kind != "lora":
                continue
            rank = mine.tensors()["down"].shape[0]
            if rank != part.rank:
                what = f"adapter.init_from has rank {part.rank} at {path}, the config asks for {rank}"
                fix = f"set adapter.rank = {part.rank}, or adapter.rank_from_file = true"
                raise ConfigError(what, where=str(config.init_from), fix=fix)
