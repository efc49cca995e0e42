"""A scenario of drawing: the pipeline of `generate` on random models, timed step by step."""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxsmith.adapters.base import AdapterSet
from fluxsmith.bench.meter import synchronise
from fluxsmith.bench.scenarios import LORA, Scenario
from fluxsmith.bench.sizes import Size, random_ae, random_dit
from fluxsmith.bench.training import SEED, stir
from fluxsmith.config.choice import realise
from fluxsmith.config.load import load_config
from fluxsmith.config.schema import RunConfig
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.generate.request import Request
from fluxsmith.models.assembly import Models, TextStates
from fluxsmith.models.compiling import compile_blocks
from fluxsmith.models.family.flux1 import PRESETS
from fluxsmith.randomness import generator

REAL_WEIGHTS = 11.9e9  # of FLUX.1: limits are in proportion for smaller models


class Drawing(NamedTuple):
    """A scenario made ready."""

    pipeline: Pipeline
    request: Request
    device: torch.device


def ready(scenario: Scenario, size: Size, device: torch.device) -> Drawing:
    """Models and request. Raises what drawing would raise."""
    config = _config(scenario)
    limit = scenario.options.get("limit")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    place = torch.device("cpu") if limit is not None else device
    if config.quant is not None:
        realise(config.quant).require(device)
    models = Models(
        dit=random_dit(size, config.quant, device, dtype=dtype, place=place), ae=random_ae(size, place, dtype=dtype)
    )  # fmt: skip
    if config.adapter is not None and "adapter" in scenario.run:
        adapters: AdapterSet = realise(config.adapter).build(models.loaded(), seed=SEED)
        stir(adapters.params)
        for adapter in adapters.modules:
            adapter.eval().requires_grad_(False).to(dtype)
    length, params = size.text(scenario.text), size.params

    def encode(prompt: str) -> TextStates:
        txt = torch.randn(1, length, params.context_in_dim, generator=generator(SEED, "bench txt", prompt))
        pooled = torch.randn(1, params.vec_in_dim, generator=generator(SEED, "bench pooled", prompt))
        return TextStates(txt, pooled, torch.ones(1, length, dtype=torch.bool)).to(device, dtype)

    preset = PRESETS["dev"]
    defaults = {"steps": 28, "guidance": 3.5, "shift": str(preset["shift"])}
    pipeline = Pipeline(models, defaults, encode)  # type: ignore[arg-type]  # numbers and a word
    if limit is not None:
        pipeline.limit = (limit if size.smaller == 1 else limit * size.counts.total / REAL_WEIGHTS, device, None)
    if scenario.options.get("compile") and models.dit is not None:
        compile_blocks(models.dit, "static")
    side = size.side(scenario.side)
    request = Request("a picture", width=side, height=side, steps=scenario.options["steps"], seed=SEED, cache=scenario.options.get("cache"))
    return Drawing(pipeline, request, device)


def _config(scenario: Scenario) -> RunConfig:
    """Adapter and quantiser as a run file has them."""
    plain = {"model": {"type": "flux1"}, "train": {"steps": 1}, "data": [{"type": "folder", "path": "x"}], "run": {"dir": "y"}}
    return load_config({**plain, "adapter": LORA, **scenario.run}).config  # a run file with `quant` has to train an adapter


class Drawn(NamedTuple):
    """One picture."""

    latents: Tensor
    seconds: float
    """With the autoencoder."""
    steps: list[float]
    notes: Mapping[str, Any]


@torch.no_grad()
def draw(drawing: Drawing) -> Drawn:
    """Draw the request once, with the time of each step."""
    pipeline, request, device = drawing
    times: list[float] = []
    last: list[Tensor] = []

    def stepped(step: int, x: Tensor, clean: Tensor) -> None:
        synchronise(device)
        times.append(time.perf_counter())
        last[:] = [x]

    synchronise(device)
    begun = time.perf_counter()
    picture = pipeline.generate(request, stepped)
    synchronise(device)
    seconds = time.perf_counter() - begun
    steps = [after - before for before, after in zip(times[:-1], times[1:], strict=True)]
    return Drawn(last[0].float().cpu(), seconds, steps, picture.notes)
