"""Latents after sampling, for each way of drawing: to the bit where they were made, within a tolerance elsewhere."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fluxsmith.adapters.formats.files import write_adapter
from fluxsmith.adapters.lora import Config
from fluxsmith.config.load import load_model
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.generate.request import Request

START = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(32, 32, 3))
CASES: dict[str, dict[str, Any]] = {
    "euler": {},
    "heun": {"sampler": "heun"},
    "dev shift": {"shift": "flux", "guidance": 4.0},
    "fixed shift": {"shift": 3.0},
    "true guidance": {"cfg": 3.0, "negative": "a blue square"},
    "image to image": {"image": START, "strength": 0.5},
    "wide": {"width": 64, "height": 16},
    "lora": {},
}


@pytest.fixture(scope="module")
def latents(golden_section: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    pipeline = Pipeline.load(load_model({"model": golden_section}), device="cpu")
    made = {}
    with torch.no_grad():
        for name, changes in CASES.items():
            if name == "lora":
                pipeline.load_lora(lora(pipeline, tmp_path_factory.mktemp("lora") / "a.safetensors"), 0.7)
            settings = {"width": 32, "height": 32, "steps": 4, "seed": 11, **changes}
            made[name] = pipeline.latents(pipeline.completed(Request("a large red circle at center", **settings)))
    return made


def lora(pipeline: Pipeline, path: Path) -> Path:
    adapters = Config(type="lora", rank=2).build(pipeline.models.loaded(), seed=1)
    generator = torch.Generator().manual_seed(2)
    values = {name: 0.1 * torch.randn(param.shape, generator=generator) for name, param in sorted(adapters.params.items())}
    write_adapter(path, adapters.state(values), dtype=torch.float32)
    adapters.detach()
    return path


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def record(tensor: Tensor) -> dict[str, Any]:
    """The digest, and every eighth value to compare with a tolerance."""
    return {"shape": list(tensor.shape), "sha256": digest(tensor), "every_8th": [round(v, 6) for v in tensor.flatten()[::8].tolist()]}


@pytest.fixture
def stored(latents: dict[str, Tensor], golden: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return golden("latents", {name: record(tensor) for name, tensor in latents.items()})


@pytest.mark.parametrize("name", CASES)
def test_latents(latents: dict[str, Tensor], stored: dict[str, Any], name: str) -> None:
    expected = stored["values"][name]
    assert list(latents[name].shape) == expected["shape"]
    found = latents[name].flatten()[::8]
    assert torch.allclose(found, torch.tensor(expected["every_8th"]), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_latents_to_the_bit(
    latents: dict[str, Tensor], stored: dict[str, Any], same_machine: Callable[[dict[str, Any]], None], name: str
) -> None:
    same_machine(stored)
    assert digest(latents[name]) == stored["values"][name]["sha256"]


def test_the_cases_differ(stored: dict[str, Any]) -> None:
    assert len({case["sha256"] for case in stored["values"].values()}) == len(CASES)
