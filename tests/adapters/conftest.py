"""Tiny models from the fixtures, loaded once a session and handed out fresh."""

import copy
import json
import shutil
from pathlib import Path

import pytest
from torch import nn

from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.load import load_clip_l, load_dit, load_t5xxl

AXES = (4, 6, 6)


@pytest.fixture(scope="session")
def loaded_models(fixtures_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, nn.Module]:
    folder = tmp_path_factory.mktemp("clip")
    shutil.copy(fixtures_root / "clip_l-tiny/weights.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    return {
        "dit": load_dit(fixtures_root / "flux-dev-tiny/weights.safetensors", axes_dim=AXES),
        "clip_l": load_clip_l(folder / "model.safetensors"),
        "t5xxl": load_t5xxl(fixtures_root / "t5-tiny/weights.safetensors"),
    }


@pytest.fixture
def models(loaded_models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return copy.deepcopy(loaded_models)


@pytest.fixture
def dit(loaded_models: dict[str, nn.Module]) -> FluxDiT:
    model = copy.deepcopy(loaded_models["dit"])
    assert isinstance(model, FluxDiT)
    return model
