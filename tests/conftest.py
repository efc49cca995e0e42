"""What all tests share: the fixtures folder, a tiny model, one torch thread, the `ledger` and `gpu` marks, a plain result line."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomlkit
import torch
from PIL import Image

from fluxsmith.demo.blank import write_blank
from fluxsmith.io.safetensors import open_weights, save_weights

HERE = Path(__file__).resolve().parent
LONG = ("tests/train/test_exact_resume.py", "tests/train/test_kill.py", "tests/train/test_long_run.py", "tests/test_sharding.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing with them")
    parser.addoption("--all-crash-points", action="store_true", help="cut runs at every point instead of at an even sample")


def pytest_configure() -> None:
    torch.set_num_threads(1)  # results on the CPU depend on the thread count


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))  # begun first, so that no worker is left with them at the end
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = {name: len(terminalreporter.stats.get(name, [])) for name in ("passed", "failed", "error", "skipped")}
    terminalreporter.write_line(
        f"{counts['passed']} passed, {counts['failed'] + counts['error']} failed, {counts['skipped']} skipped", bold=True
    )


@pytest.fixture(scope="session")
def fixtures_root() -> Path:
    """Folder of the parity fixtures: FLUXSMITH_FIXTURES, or tests/fixtures."""
    for folder in (os.environ.get("FLUXSMITH_FIXTURES"), HERE / "fixtures", HERE.parent.parent / "shared" / "fixtures"):
        if folder and Path(folder).is_dir():
            return Path(folder)
    pytest.fail("no fixtures folder: set FLUXSMITH_FIXTURES to one")


@pytest.fixture(scope="session")
def manifests_root() -> Path:
    """Folder of the key-and-shape lists of the public model files."""
    return HERE / "manifests"


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """True when golden files are to be rewritten."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small untrained model: dit, clip_l, t5xxl, ae, tokenizers. Nothing in it is zero, so every input has an effect."""
    folder = tmp_path_factory.mktemp("tiny-model")
    with torch.random.fork_rng(devices=[]):
        write_blank(folder)
    generator = torch.Generator().manual_seed(1)
    with open_weights(folder / "dit.safetensors") as weights:
        tensors = {name: weights.tensor(name) for name in weights}
    for name, tensor in tensors.items():
        if not tensor.any():
            tensors[name] = torch.randn(tensor.shape, generator=generator) * 0.05
    save_weights(folder / "dit.safetensors", tensors, {})
    return folder


@pytest.fixture(scope="session")
def tiny_section(tiny_model: Path) -> dict[str, str]:
    """The `model` section of a run file for the tiny model."""
    files = {"path": "dit", "clip_l": "clip_l", "t5xxl": "t5xxl", "ae": "ae"}
    section = {key: str(tiny_model / f"{name}.safetensors") for key, name in files.items()}
    return {"type": "flux1", "preset": "flux-shapes", **section}


@pytest.fixture(scope="session")
def tiny_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight smooth 32 x 32 pictures with captions."""
    folder = tmp_path_factory.mktemp("tiny-pictures")
    for number in range(8):
        low = np.random.default_rng(number).integers(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(low).resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {['red', 'blue', 'green', 'yellow'][number % 4]} circle {number}", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_section: dict[str, str], tiny_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """A LoRA run on the tiny model as plain values: `tiny_run(tmp_path / "run", {"train.steps": 2, "adapter": None})`."""
    cache = tmp_path_factory.mktemp("tiny-cache")

    def make(run_dir: Path, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        values: dict[str, Any] = {
            "model": dict(tiny_section),
            "adapter": {"type": "lora", "rank": 2},
            "optim": {"type": "torch", "lr": 1e-3},
            "train": {"steps": 4, "seed": 3, "device": "cpu", "threads": 1},
            "data": [{"type": "folder", "path": str(tiny_pictures), "resolution": 32, "batch_size": 2, "buckets": {"step": 16, "min": 16}}],
            "cache": {"dir": str(cache)},
            "run": {"dir": str(run_dir)},
        }
        for key, value in (changes or {}).items():
            *path, last = key.split(".")
            place: Any = values
            for part in path:
                place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
            if value is None:
                place.pop(last, None)
            else:
                place[last] = value
        return values

    return make


@pytest.fixture(scope="session")
def tiny_run_file(tiny_run: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    """The same as a TOML file beside the run folder; returns the file's path."""

    def make(run_dir: Path, changes: Mapping[str, Any] | None = None) -> Path:
        path = run_dir.with_name(f"{run_dir.name}.toml")
        path.write_text(tomlkit.dumps(tiny_run(run_dir, changes)), encoding="utf-8")
        return path

    return make
