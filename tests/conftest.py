"""What all tests share: the fixtures folder, one torch thread, the `ledger` and `gpu` marks, and a plain result line."""

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing with them")


def pytest_configure() -> None:
    torch.set_num_threads(1)  # results on the CPU depend on the thread count


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
