"""`fluxsmith data scan`: table, JSON, page, exit codes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from fluxsmith.cli.main import run

pytestmark = pytest.mark.ledger("FS-07")


class Result(NamedTuple):
    exit_code: int
    output: str
    errors: str


Scan = Callable[..., Result]


@pytest.fixture
def scan(capsys: pytest.CaptureFixture[str]) -> Scan:
    """Runs `fluxsmith data scan ...` as the console script does."""

    def call(*arguments: str | Path) -> Result:
        code = run(["data", "scan", *map(str, arguments)])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "cats"
    folder.mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (90, 120 + 30 * number, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a cat, number {number}")
    return folder


def test_a_folder_is_shown_with_its_buckets(scan: Scan, pictures: Path) -> None:
    result = scan(pictures, "--resolution", "64")
    assert result.exit_code == 0
    assert "cats: 3 found, 3 usable: a run can start" in result.output
    assert "64 x 64" in result.output


def test_several_resolutions_are_several_data_sets(scan: Scan, pictures: Path) -> None:
    result = scan(pictures, "--resolution", "64", "--resolution", "128", "--json")
    buckets = [dataset["buckets"][0]["bucket"] for dataset in json.loads(result.output)["datasets"]]
    assert buckets == [{"width": 64, "height": 64}, {"width": 128, "height": 128}]


def test_problems_end_with_exit_code_3_and_name_file_and_cure(scan: Scan, pictures: Path) -> None:
    (pictures / "broken.png").write_bytes(b"no picture")
    result = scan(pictures, "--resolution", "64")
    assert result.exit_code == 3
    line = next(line for line in result.output.splitlines() if "broken.png" in line)
    assert "Fix:" in line
    assert "a run would not start" in result.output


@pytest.mark.parametrize(("name", "exit_code", "words"), [("nowhere", 3, "data folder not found"), ("empty", 3, "no pictures found")])
def test_folders_without_pictures(scan: Scan, tmp_path: Path, name: str, exit_code: int, words: str) -> None:
    (tmp_path / "empty").mkdir()
    result = scan(tmp_path / name)
    assert result.exit_code == exit_code
    assert words in result.errors
    assert "Traceback" not in result.errors


def test_bad_settings_are_exit_code_2(scan: Scan, pictures: Path) -> None:
    result = scan(pictures, "--resolution", "24")
    assert result.exit_code == 2
    assert "buckets.step = 16" in result.errors


def test_the_page_is_written(scan: Scan, pictures: Path, tmp_path: Path) -> None:
    target = tmp_path / "cats.html"
    result = scan(pictures, "--resolution", "64", "--html", target)
    assert result.exit_code == 0
    assert target.read_text().count("data:image/jpeg") == 3


def test_the_pictures_are_not_touched(scan: Scan, pictures: Path) -> None:
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in pictures.iterdir()}
    scan(pictures, "--resolution", "64")
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in pictures.iterdir()} == before


def test_help_does_not_import_torch() -> None:
    code = "import sys, fluxsmith.cli.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_file_is_scanned_with_its_own_settings(scan: Scan, pictures: Path, tmp_path: Path) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(
        f"""
model = {{ type = "flux1", path = "{tmp_path}/dit.safetensors" }}
train = {{ steps = 10 }}
run = {{ dir = "{tmp_path}/run" }}
data = [
    {{ type = "folder", path = "{pictures}", resolution = 64, name = "small" }},
    {{ type = "folder", path = "{pictures}", resolution = 96, name = "large", buckets = {{ step = 32 }} }},
]
"""
    )
    result = scan(run_file)
    assert result.exit_code == 0
    assert "small: 3 found" in result.output
    assert "large: 3 found" in result.output
    assert "96 x 96" in result.output
    assert "captions were not measured in tokens" in result.output
    assert not (tmp_path / "run").exists()
