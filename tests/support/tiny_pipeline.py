"""The pipeline of the tiny model that `tiny_run.write_model` wrote, with controls."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.generate.request import Request

PARTS = {"path": "dit", "clip_l": "clip_l", "t5xxl": "t5xxl", "ae": "ae"}


def model_section(folder: Path) -> dict[str, Any]:
    """The `model` section."""
    files = {key: str(folder / f"{name}.safetensors") for key, name in PARTS.items()}
    return {"type": "flux1", "preset": "flux-shapes", **files, **{key: str(folder / key) for key in ("tokenizer", "tokenizer_2")}}


def load(folder: Path, *controls: Mapping[str, Any]) -> Pipeline:
    """On the CPU."""
    return Pipeline.load(model_section(folder), controls=controls, device="cpu")


def latents(pipeline: Pipeline, **options: Any) -> Tensor:
    """Denoised latents of a picture of 64 x 64 in two steps."""
    request = Request(**{"prompt": "a red circle", "width": 64, "height": 64, "steps": 2, **options})
    request.check()
    return pipeline.latents(pipeline.completed(request))
