"""Goldens: a model whose every value is fixed by its name, where the numbers were made, and how files are compared."""

import hashlib
import json
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxsmith.io.safetensors import open_weights, save_weights

HERE = Path(__file__).parent
ROLES = ("dit", "clip_l", "t5xxl", "ae")


def machine() -> dict[str, str]:
    """What the last bits of a result depend on."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace") if Path("/proc/cpuinfo").is_file() else ""
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return {
        "torch": torch.__version__,
        "cpu": name[1] if name else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


@pytest.fixture(scope="session")
def golden_section(tiny_model: Path, tiny_section: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The `model` section of a model with the tiny one's shapes; no library's idea of initial values is in it."""
    folder = tmp_path_factory.mktemp("golden-model")
    for role in ROLES:
        with open_weights(tiny_model / f"{role}.safetensors") as weights:
            tensors = {name: _fixed(name, weights.tensor(name)) for name in weights}
            save_weights(folder / f"{role}.safetensors", tensors, dict(weights.metadata))
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).symlink_to(tiny_model / name)
    files = {key: str(folder / Path(tiny_section[key]).name) for key in ("path", "clip_l", "t5xxl", "ae")}
    return {**tiny_section, **files}


def _fixed(name: str, like: torch.Tensor) -> torch.Tensor:
    """Normal values by the tensor's name: scales about 1, biases small, matrices by their inputs."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    values = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    if like.dim() >= 2:
        return values / like[0].numel() ** 0.5
    return 0.05 * values if name.endswith("bias") else 1 + 0.05 * values


@pytest.fixture
def golden(update_golden: bool) -> Callable[[str, Any], dict[str, Any]]:
    """`golden("name", values)`: the stored values with the machine that made them; with --update-golden they are written first."""

    def stored(name: str, values: Any) -> dict[str, Any]:
        path = HERE / f"{name}.json"
        if update_golden:
            path.write_text(json.dumps({"made_by": machine(), "values": values}, indent=1) + "\n", encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    return stored


@pytest.fixture
def same_machine() -> Callable[[dict[str, Any]], None]:
    """Skips a comparison to the bit where the numbers were made elsewhere."""

    def check(stored: dict[str, Any]) -> None:
        differing = {key: (value, machine()[key]) for key, value in stored["made_by"].items() if machine()[key] != value}
        if differing:
            pytest.skip("made on another machine: " + ", ".join(f"{key} {was}, here {here}" for key, (was, here) in differing.items()))

    return check
