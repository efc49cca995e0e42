"""A tiny model with pictures and caches on disk, made once a session, and runs on it with a record of what they said and wrote."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import tiny_run
from ran import Ran

from fluxsmith.config.schema import RunConfig
from fluxsmith.errors import FluxsmithError
from fluxsmith.events import Bus, Event
from fluxsmith.io.durable import Disk
from fluxsmith.train.run import train


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the model; `pictures/` in it, `cache/` filled by the first run that wants it."""
    return tiny_run.prepare_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run_config(tiny_model: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """`run_config(changes, name="run")`: a config of a run of four steps in the test's own folder."""

    def make(changes: tiny_run.Options | None = None, name: str = "run") -> RunConfig:
        short = {"train.steps": 4, "checkpoint.every": 0, "schedule.warmup": 0, "run.name": "w"}
        return tiny_run.config(tiny_model, tmp_path / name, {**short, **(changes or {})})

    return make


@pytest.fixture
def go(run_config: Callable[..., RunConfig]) -> Callable[..., Ran]:
    """`go(changes, name="run", ...)`: train, and say what came of it; an error of ours is part of the result."""

    def run(
        changes: tiny_run.Options | None = None,
        name: str = "run",
        *,
        disk: Disk | None = None,
        resume: bool = False,
        allow: Sequence[str] = (),
        sinks: Iterable[Callable[[Event], None]] = (),
    ) -> Ran:
        config = run_config(changes, name)
        ran = Ran(config.run.dir)
        try:
            train(config, resume=resume, allow_change=allow, bus=Bus(ran.events.append, *sinks), disk=disk)
        except FluxsmithError as error:
            ran.error = error
        return ran

    return run
