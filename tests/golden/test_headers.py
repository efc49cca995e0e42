"""What the files of a run hold: keys, shapes, types and metadata of a LoRA in both formats and of a full fine-tune."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxsmith.config.load import load_config
from fluxsmith.events import Bus
from fluxsmith.io.safetensors import read_header
from fluxsmith.train.run import train

RUNS: dict[str, dict[str, Any]] = {
    "kohya": {"adapter": {"type": "lora", "rank": 2, "alpha": 1, "text_encoders": ["clip_l", "t5xxl"]}, "cache.text": "off"},
    "peft": {"adapter": {"type": "lora", "rank": 2, "rank_by_pattern": {"single_blocks": 3}}, "checkpoint.format": "peft"},
    "minimal": {"checkpoint": {"metadata": "minimal", "dtype": "fp16"}},
    "full": {"adapter": None, "train.components": ["dit", "clip_l"], "checkpoint.dtype": "bf16", "cache.text": "off"},
}
CHANGING = re.compile(r"ss_session_id|.*(_at|_hash|\.date|implementation_version)$")  # times, digests, our version


def describe(path: Path) -> dict[str, Any]:
    """Key -> type and shape; metadata without what differs from run to run."""
    header = read_header(path)
    tensors = {name: f"{info.dtype} {list(info.shape)}" for name, info in sorted(header.tensors.items())}
    metadata = {key: "(changes)" if CHANGING.fullmatch(key) else value for key, value in sorted(header.metadata.items())}
    return {"tensors": tensors, "metadata": {key: value.replace(path.stem, "NAME") for key, value in metadata.items()}}


@pytest.fixture(scope="module")
def headers(tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = {}
    for name, changes in RUNS.items():
        folder = tmp_path_factory.mktemp(name)
        changes = {
            "train.steps": 1,
            "checkpoint.trigger_phrase": "zibbo",
            "checkpoint.author": "someone",
            "data.0.name": "pictures",
            **changes,
        }
        train(load_config(tiny_run(folder / name, changes)).config, bus=Bus())
        found |= {f"{name}/{path.name}": describe(path) for path in sorted((folder / name / "weights").iterdir())}
    return found


def test_headers(headers: dict[str, Any], golden: Callable[..., dict[str, Any]]) -> None:
    stored = golden("headers", headers)["values"]
    assert set(headers) == set(stored)
    for name, expected in stored.items():
        assert headers[name]["tensors"] == expected["tensors"], name
        assert headers[name]["metadata"] == expected["metadata"], name


def test_the_golden_holds_what_it_should(headers: dict[str, Any]) -> None:
    """Sd-scripts' module name and every ss_ block in full files; no captions or folder names in minimal ones."""
    full, minimal = headers["kohya/kohya.safetensors"]["metadata"], headers["minimal/minimal.safetensors"]["metadata"]
    assert full["ss_network_module"] == "networks.lora_flux"
    assert full["ss_network_dim"] == "2"
    assert full["modelspec.trigger_phrase"] == "zibbo"
    assert sum(key.startswith("ss_") for key in full) > 70
    assert sum(key.startswith("ss_") for key in minimal) < 10
    assert "circle" not in str(minimal)
    assert "/tmp" not in str(headers)
    assert any(key.startswith("lora_te1_") for key in headers["kohya/kohya.safetensors"]["tensors"])
    assert set(headers) == {
        "kohya/kohya.safetensors",
        "peft/peft.safetensors",
        "minimal/minimal.safetensors",
        "full/full.safetensors",
        "full/full-clip_l.safetensors",
    }
