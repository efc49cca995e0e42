"""A workspace in which the documents' commands run: example, tiny model, pictures, run files, and a bundled model."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fluxsmith.cli.main import run
from fluxsmith.demo import demo
from fluxsmith.io import sources

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def prepared(tiny_model: Path, tiny_pictures: Path, tiny_run_file: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every workspace begins with; `runs/cats` is a run that was stopped halfway."""
    folder = tmp_path_factory.mktemp("documents")
    shutil.copytree(ROOT / "examples", folder / "examples")
    if not (folder / "examples" / "tiny").is_dir():
        (folder / "examples" / "tiny").mkdir()
        shutil.copy(demo.RUN_FILE, folder / "examples" / "tiny" / "run.toml")
        demo.write_pictures(folder / "examples" / "tiny" / "pictures")
    shutil.copytree(tiny_model, folder / "model")
    shutil.copytree(tiny_pictures, folder / "cats")
    (folder / "bundle").mkdir()
    shutil.copytree(tiny_model, folder / "bundle" / "flux-shapes")
    local = {"model.path": "model/dit.safetensors"} | {f"model.{role}": f"model/{role}.safetensors" for role in ("clip_l", "t5xxl", "ae")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        local |= {"data.0.path": "cats", "cache.dir": "cache"}
        for name, run_dir in (("run", "runs/cats"), ("tiny", "runs/tiny")):
            tiny_run_file(folder / name, {**local, "run.dir": run_dir})
        assert run(["train", "run.toml", "train.steps=2", "--quiet"]) == 0
    return folder


@pytest.fixture
def workspace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy as the current folder; the real bundled model is used where there is one."""
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    if not (sources.BUNDLE_FOLDER / "flux-shapes").is_dir():
        monkeypatch.setattr(sources, "BUNDLE_FOLDER", folder / "bundle")
    monkeypatch.chdir(folder)
    return folder
