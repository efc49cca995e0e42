"""A tiny model with pictures and caches on disk, made once a session, and runs on it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run

from fluxsmith.config.schema import RunConfig


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the model; `pictures/` beside it, `cache/` filled by the first run that wants it."""
    return tiny_run.prepare_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run_config(tiny_model: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """`run_config(changes, name="run")`: a config of a short run in the test's own folder."""

    def make(changes: tiny_run.Options | None = None, name: str = "run") -> RunConfig:
        return tiny_run.config(tiny_model, tmp_path / name, {"train.steps": 4, "checkpoint.every": 0, **(changes or {})})

    return make
