"""LoRA (Hu et al. 2021): y + strength * alpha / rank * up(down(x)). `adapter = { type = "lora", rank = 16, targets = "all" }`.

A fused layer has one pair of factors, or with `split_qkv` one pair for each of q, k, v (and mlp).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor, nn

from fluxsmith.adapters.base import Adapter, AdapterSet, layers_of, linear_layers, unknown_layers
from fluxsmith.adapters.formats.files import read_adapter
from fluxsmith.adapters.formats.state import AdapterState, LayerState, Part
from fluxsmith.adapters.init import INITS
from fluxsmith.adapters.targets import Layer, Target, last_match, select
from fluxsmith.config.adapter import AdapterConfig
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.models.linear import Linear


class Config(AdapterConfig):
    """Low-rank factors beside each layer."""

    init: Literal["default", "gaussian"] = "default"
    """How the down factor begins (up is zero): uniform, or normal."""
    rslora: bool = False
    """Strength alpha / sqrt(rank) instead of alpha / rank."""
    split_qkv: bool = False
    """Separate factors for q, k, v (and mlp) of fused layers."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of rank activations set to zero in training."""
    rank_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of ranks left out per sample in training; the others are scaled up."""
    module_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that a layer's adapter is skipped for one forward in training."""
    loraplus_ratio: PositiveFloat = 1.0
    """Learning rate of the up factors relative to the down factors (LoRA+)."""

    @model_validator(mode="after")
    def _file_is_given(self) -> "Config":
        if self.rank_from_file and self.init_from is None:
            raise ValueError("rank_from_file needs init_from")
        return self

    def build(self, models: Mapping[str, nn.Module], *, seed: int = 0, dtype: torch.dtype | None = None) -> AdapterSet:
        """The adapters for the loaded models (`dit`, `clip_l`, `t5xxl`), attached, with learning-rate groups.

        `dtype` of the factors is float32 by default. Raises ConfigError for targets that hit nothing, and for a starting file
        that does not fit.
        """
        bases = linear_layers(models)
        start = read_adapter(self.init_from) if self.init_from is not None else None
        made = from_state(start, bases) if start is not None and self.rank_from_file else _fresh(self, bases, seed, start)
        for adapter in made.modules:
            if isinstance(adapter, Lora):
                adapter.dropouts = (self.dropout, self.rank_dropout, self.module_dropout)
            for param in adapter.parameters():
                param.data = param.data.to(dtype or torch.float32)
            adapter.train()
        made.group_by(self._group)
        made.attach()
        return made

    def _group(self, path: str, short: str) -> tuple[str, float | None, float]:
        role, part = path.split(".", 1)[0], short.rpartition(".")[0]
        role_lr = {"dit": self.dit_lr, "clip_l": self.clip_l_lr, "t5xxl": self.t5xxl_lr}[role]
        lr = last_match(self.lr_by_pattern, f"{path}:{part}" if part else path, role_lr)
        name = role if lr == role_lr else f"{role} lr {lr:g}"
        if self.loraplus_ratio != 1 and short.endswith("up"):
            return f"{name} up", lr, self.loraplus_ratio
        return name, lr, 1.0


class LoraPart(nn.Module):
    """One pair of factors for output rows start..stop."""

    def __init__(self, name: str, rows: tuple[int, int], down: Tensor, up: Tensor, alpha: float) -> None:
        """`alpha` is in the sense of files: strength alpha / rank."""
        super().__init__()
        self.name, self.rows, self.alpha = name, rows, alpha
        self.down = nn.Parameter(down)  # (rank, in)
        self.up = nn.Parameter(up)  # (rows, rank)
        self.scale = torch.tensor(alpha / down.shape[0], dtype=torch.float64)  # no buffer: a cast of the model must not round it


class Lora(Adapter):
    """The factors of one layer: one whole part, or parts of a fused layer in row order."""

    def __init__(self, parts: Sequence[LoraPart], out_features: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(sorted(parts, key=lambda part: part.rows))
        self.out_features = out_features
        self.dropouts = (0.0, 0.0, 0.0)  # on activations, on ranks, on the whole layer

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """As Adapter.forward. Dropout draws from torch's global generator, in train mode only."""
        if not self.is_enabled or self._skips():
            return y
        parts = [part for part in self.parts if isinstance(part, LoraPart)]
        if len(parts) == 1 and parts[0].rows == (0, self.out_features):
            return y + self._part(parts[0], x).to(y.dtype)
        pieces, row = [], 0
        for part in parts:
            start, stop = part.rows
            pieces += [y.new_zeros(*y.shape[:-1], start - row)] if start > row else []
            pieces.append(self._part(part, x).to(y.dtype))
            row = stop
        pieces += [y.new_zeros(*y.shape[:-1], self.out_features - row)] if row < self.out_features else []
        return y + torch.cat(pieces, dim=-1)

    def _part(self, part: LoraPart, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(part.down.dtype)
        hidden = F.linear(x, part.down)  # (..., rank)
        if self.training:
            hidden = self._drop(hidden)
        return F.linear(hidden * (part.scale * self.strength), part.up)

    def _drop(self, hidden: Tensor) -> Tensor:
        dropout, rank_dropout, _ = self.dropouts
        if dropout:
            hidden = F.dropout(hidden, dropout)
        if rank_dropout:
            shape = (hidden.shape[0], *[1] * (hidden.dim() - 2), hidden.shape[-1])  # one draw per sample, the same for all tokens
            kept = torch.rand(shape, device=hidden.device) > rank_dropout
            hidden = hidden * kept / (1 - rank_dropout)
        return hidden

    def _skips(self) -> bool:
        return self.training and self.dropouts[2] > 0 and bool(torch.rand(()) < self.dropouts[2])

    def delta(self, weight: Tensor) -> Tensor:
        """As Adapter.delta."""
        whole = self.state({name: param.detach() for name, param in self.tensors().items()}).delta()
        return whole.to(weight.device) * float(self.strength)

    def tensors(self) -> dict[str, nn.Parameter]:
        """As Adapter.tensors: `down`, `up`, or `q.down`, `q.up`, ..."""
        named: dict[str, nn.Parameter] = {}
        for part in self.parts:
            if isinstance(part, LoraPart):
                prefix = f"{part.name}." if part.name else ""
                named |= {f"{prefix}down": part.down, f"{prefix}up": part.up}
        return named

    def state(self, values: Mapping[str, Tensor]) -> LayerState:
        """As Adapter.state."""
        made = []
        for part in self.parts:
            if isinstance(part, LoraPart):
                prefix = f"{part.name}." if part.name else ""
                down, up = values[f"{prefix}down"].cpu(), values[f"{prefix}up"].cpu()
                made.append(Part(part.name, *part.rows, down, up, part.alpha))
        return LayerState(tuple(made), self.out_features)

    @torch.no_grad()
    def load(self, state: LayerState) -> None:
        """As Adapter.load; the file's strength is carried over into the up factor, so the layer does exactly what the file says."""
        own = {part.name: part for part in self.parts if isinstance(part, LoraPart)}
        if set(own) != {part.name for part in state.parts}:
            theirs = ", ".join(part.name or "whole" for part in state.parts)
            raise ModelFileError(f"the file has factors for {theirs}, the adapter for {', '.join(name or 'whole' for name in own)}")
        for part in state.parts:
            mine = own[part.name]
            if mine.down.shape != part.down.shape or mine.up.shape != part.up.shape:
                why = f"{tuple(part.down.shape)} and {tuple(part.up.shape)} against {tuple(mine.down.shape)} and {tuple(mine.up.shape)}"
                raise ModelFileError("the file's factors have other sizes than the adapter's", why=why)
            mine.down.copy_(part.down)
            ratio = part.scale * mine.down.shape[0] / mine.alpha
            mine.up.copy_(part.up if ratio == 1 else part.up * ratio)


def _fresh(config: Config, bases: Mapping[str, Linear], seed: int, start: AdapterState | None) -> AdapterSet:
    targets = select(config, layers_of(bases), split=config.split_qkv)
    by_layer: dict[str, list[Target]] = {}
    for target in targets:
        by_layer.setdefault(target.layer.path, []).append(target)
    adapters = {path: _layer(config, own, bases[path], seed) for path, own in by_layer.items()}
    made = AdapterSet(bases, adapters)
    if start is not None:
        _check_start(config, made, start)
        made.load(start)
    return made


def _layer(config: Config, targets: Sequence[Target], base: Linear, seed: int) -> Lora:
    parts = []
    for target in targets:
        down, up = INITS[config.init](target, seed)
        alpha = target.alpha * math.sqrt(target.rank) if config.rslora else target.alpha  # files know alpha / rank only
        parts.append(LoraPart(target.part, target.rows, down, up, alpha))
    return Lora(parts, base.out_features).to(base.weight.device)


def _check_start(config: Config, made: AdapterSet, start: AdapterState) -> None:
    """A starting file whose ranks differ from the config is refused with the value that fits."""
    for path, layer in start.layers.items():
        adapter = made.adapters.get(path)
        ranks = {part.down.shape[0] for part in adapter.parts if isinstance(part, LoraPart)} if isinstance(adapter, Lora) else set()
        if ranks and ranks != {part.rank for part in layer.parts}:
            what = f"adapter.init_from has rank {layer.rank} at {path}, the config asks for {max(ranks)}"
            fix = f"set adapter.rank = {layer.rank}, or adapter.rank_from_file = true"
            raise ConfigError(what, where=str(config.init_from), fix=fix)


def from_state(state: AdapterState, bases: Mapping[str, Linear], *, name: str = "adapter") -> AdapterSet:
    """Adapters exactly as a file holds them, not attached. Raises ModelFileError for layers that the models lack or of other size."""
    unknown = [path for path in state.layers if path not in bases]
    if unknown:
        raise unknown_layers(unknown, "the model has no such layers")
    adapters = {path: _from_layer(path, layer, bases[path]) for path, layer in state.layers.items()}
    return AdapterSet(bases, adapters, name=name)


def _from_layer(path: str, layer: LayerState, base: Linear) -> Lora:
    size = Layer(path, base.in_features, base.out_features)
    if layer.in_features != size.in_features or layer.out_features not in (None, size.out_features):
        why = f"{layer.out_features or '?'} x {layer.in_features} against {size.out_features} x {size.in_features}"
        raise ModelFileError(f"the adapter is for a model of another size at {path}", why=why, fix="use it with its own base model")
    parts = [LoraPart(p.name, (p.start, p.stop), p.down.clone().float(), p.up.clone().float(), p.alpha) for p in layer.parts]
    return Lora(parts, base.out_features).to(base.weight.device)


def load_adapter(path: Path, models: Mapping[str, nn.Module], *, strength: float = 1.0, name: str = "adapter") -> AdapterSet:
    """Read a file in any known format and attach it to the loaded models, for inference."""
    made = from_state(read_adapter(path), linear_layers(models), name=name)
    made.scale(strength)
    made.attach()
    for adapter in made.modules:
        adapter.requires_grad_(False).eval()
    return made
