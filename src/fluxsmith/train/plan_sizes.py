"""Exact sizes of what a run adds to its transformer: adapters by their own shapes, control models, layers as they will be stored.

Adapters and control models are built without memory; so any kind, rank, pattern and factor is counted as it will be.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from fluxsmith.adapters.base import AdapterSet
from fluxsmith.config.adapter import AdapterConfig
from fluxsmith.config.choice import realise
from fluxsmith.config.schema import RunConfig
from fluxsmith.controls.controlnet_model import ControlNet, ControlNetParams
from fluxsmith.errors import ConfigError, FluxsmithError
from fluxsmith.io.header import read_header
from fluxsmith.io.shards import shard_paths
from fluxsmith.memory.job import Stored
from fluxsmith.memory.sizes import BLOCK, BYTES, MODULATION, Shapes
from fluxsmith.models.files import locate
from fluxsmith.models.fill import meta
from fluxsmith.models.flux import FluxDiT, FluxParams
from fluxsmith.models.linear import Linear
from fluxsmith.models.load import build_dit
from fluxsmith.models.text_encoders import ClipParams, ClipText, T5Params, T5Text
from fluxsmith.quant.base import config_for
from fluxsmith.train.trained import DTYPES

CLIP_L = ClipParams(49_408, 768, 3072, 12, 77, 12, 49_407)  # of every FLUX.1, where there is no file yet
T5XXL = T5Params(32_128, 4096, 64, 10_240, 24, 64, 32)
CLIP_STREAMS, T5_STREAMS = 34, 40  # values a token and channel that a layer of these keeps for the backward pass
HINT_PIXEL = 85  # values a pixel that XLabs' small convolutional net keeps: 16 channels, twice each, eight times at four sizes
P = TypeVar("P", ClipParams, T5Params)


class Sizes(NamedTuple):
    """What is trained beside the base."""

    dit: FluxDiT | None
    """Without memory, with its adapters; None where nobody asked for it."""
    adapters: int
    clip: ClipParams | None = None
    """Encoders that have adapters."""
    t5: T5Params | None = None

    @property
    def has_text(self) -> bool:
        """Are encoders in the loop?"""
        return self.clip is not None or self.t5 is not None

    def text_activations(self, batch: int) -> int:
        """Bytes that trained encoders keep, about."""
        t5 = 0 if self.t5 is None else batch * 512 * self.t5.hidden * self.t5.layers * T5_STREAMS * 2
        clip = 0 if self.clip is None else batch * self.clip.positions * self.clip.hidden * self.clip.layers * CLIP_STREAMS * 2
        return t5 + clip


def trained_sizes(config: RunConfig, shapes: Shapes, *, base: str, is_full: bool, known: int | None = None) -> Sizes:
    """The transformer without memory, and the number of weights of all adapters.

    Where that number is `known`, three blocks are enough, unless targets name others.
    """
    if known is not None:
        try:
            return trained_sizes(config, sampled(shapes), base=base, is_full=is_full)._replace(adapters=known)
        except ConfigError:  # a pattern hits nothing in these blocks
            pass
    dit = meta(lambda: build_dit(shapes, config.model.model_dump().get("axes_dim"))).to(DTYPES[base]).requires_grad_(is_full)
    if not isinstance(config.adapter, AdapterConfig):
        return Sizes(dit, 0)
    roles = config.adapter.text_encoders
    clip = _params(config, "clip_l", ClipParams.from_shapes, CLIP_L) if "clip_l" in roles else None
    t5 = _params(config, "t5xxl", T5Params.from_shapes, T5XXL) if "t5xxl" in roles else None
    models: dict[str, nn.Module] = {"dit": dit}
    if clip is not None:
        models["clip_l"] = meta(lambda: ClipText(clip))
    if t5 is not None:
        models["t5xxl"] = meta(lambda: T5Text(t5))
    own = config.adapter.model_copy(update={"init_from": None, "rank_from_file": False})
    with torch.device("meta"):
        made: AdapterSet = realise(own).build(models, seed=0, dtype=DTYPES[config.train.weights_dtype])
    return Sizes(dit, sum(param.numel() for param in made.params.values()), clip, t5)


def sampled(shapes: Shapes) -> Shapes:
    """Of a transformer with the first double block, the first single block and the last, if it has so many."""
    numbers: dict[str, set[int]] = {"double": set(), "single": set()}
    for name in shapes:
        if match := BLOCK.match(name):
            numbers[match[1]].add(int(match[2]))
    kept = {("double", 0): 0, ("single", 0): 0, ("single", max(numbers["single"], default=0)): min(1, max(numbers["single"], default=0))}
    made = {}
    for name, shape in shapes.items():
        match = BLOCK.match(name)
        if match is None:
            made[name] = shape
        elif (key := (match[1], int(match[2]))) in kept:
            made[f"{match[1]}_blocks.{kept[key]}.{match[3]}"] = shape
    return made


def _params(config: RunConfig, role: str, read: Callable[[Shapes], P], otherwise: P) -> P:
    """Of the file, if it is there and has the names of its role."""
    try:
        shards = shard_paths(locate(config.model).path(role))
        return read({name: info.shape for shard in shards for name, info in read_header(shard).tensors.items()})
    except (FluxsmithError, OSError):  # the transformer's note says what is assumed
        return otherwise


class Controls(NamedTuple):
    """Control models beside the transformer."""

    weights: int = 0
    """Bytes of frozen ones."""
    trained: int = 0
    """Weights of the trained one."""
    blocks: tuple[int, int] = (0, 0)
    """Its double and single blocks."""
    held: int = 0
    """Bytes that it keeps outside them for a picture of one pixel."""
    encodes: bool = False


def control_sizes(config: RunConfig, shapes: Shapes, base: str) -> Controls:
    """Of all control models of a run."""
    made = Controls()
    for entry in config.control:
        values = entry.model_dump()
        layout, is_trained = values.get("layout"), bool(values.get("train"))
        if values.get("path"):
            weights, depths = _elements(str(values["path"])), (0, 0)
        elif values["type"] == "controlnet":
            depths = (int(values["double_blocks"]), int(values["single_blocks"]))
            weights = _fresh(config, shapes, layout, depths)
        else:
            continue  # it adds inputs, no weights
        if not is_trained:
            made = made._replace(weights=made.weights + int(weights * BYTES[base]))
            continue
        held = HINT_PIXEL * (4 if config.train.precision == "no" or base == "fp32" else 2) if layout == "pixels" else 0
        made = made._replace(trained=weights, blocks=depths, held=held)
    return made._replace(encodes=any(entry.model_dump().get("layout") == "latents" for entry in config.control))


def _fresh(config: RunConfig, shapes: Shapes, layout: Any, depths: tuple[int, int]) -> int:
    """Weights of a new ControlNet."""
    params = FluxParams.from_shapes(shapes, config.model.model_dump().get("axes_dim"))
    trunk = replace(params, depth=depths[0], depth_single_blocks=depths[1])
    net = meta(lambda: ControlNet(ControlNetParams(trunk, layout, trunk.in_channels)))
    return sum(param.numel() for param in net.parameters())


def _elements(path: str) -> int:
    try:
        return sum(info.elements for shard in shard_paths(path) for info in read_header(shard).tensors.values())
    except (FluxsmithError, OSError):
        return 0


def stored(config: RunConfig, shapes: Shapes, base: str) -> Stored | None:
    """Bytes of each block as the quantiser of a run will store it, with its exceptions; None without one."""
    if config.quant is None or not hasattr(realise(config.quant), "make"):
        return None
    own, width = realise(config.quant), BYTES[base]
    blocks: dict[tuple[str, int], float] = {}
    modulation = rest = 0.0
    for name, shape in shapes.items():
        size = _stored(own, name, shape, width)
        match = BLOCK.match(name)
        if match is None:
            rest += size
        elif MODULATION.match(match[3]):
            modulation += size
        else:
            key = (match[1], int(match[2]))
            blocks[key] = blocks.get(key, 0.0) + size
    return Stored(tuple(int(blocks[key]) for key in sorted(blocks)), int(modulation), int(rest))


def _stored(own: Any, name: str, shape: Sequence[int], width: float) -> float:
    layer, _, leaf = name.rpartition(".")
    sizes = tuple(shape)
    if leaf != "weight" or len(sizes) != 2:
        return math.prod(sizes) * width
    chosen = config_for(own, f"dit.{layer}", meta(lambda: Linear(sizes[1], sizes[0], bias=False)))
    return math.prod(sizes) * width if chosen is None else chosen.bytes(sizes[1], sizes[0])
