"""`fluxsmith data scan`: table, JSON, page, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fluxsmith.cli.data import app

pytestmark = pytest.mark.ledger("FS-07")
runner = CliRunner()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "cats"
    folder.mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (90, 120 + 30 * number, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a cat, number {number}")
    return folder


def test_a_folder_is_shown_with_its_buckets(pictures: Path) -> None:
    result = runner.invoke(app, ["scan", str(pictures), "--resolution", "64"])
    assert result.exit_code == 0
    assert "cats: 3 found, 3 usable: a run can start" in result.output
    assert "64 x 64" in result.output


def test_several_resolutions_are_several_data_sets(pictures: Path) -> None:
    result = runner.invoke(app, ["scan", str(pictures), "--resolution", "64", "--resolution", "128", "--json"])
    buckets = [dataset["buckets"][0]["bucket"] for dataset in json.loads(result.output)["datasets"]]
    assert buckets == [{"width": 64, "height": 64}, {"width": 128, "height": 128}]


def test_problems_end_with_exit_code_3_and_name_file_and_cure(pictures: Path) -> None:
    (pictures / "broken.png").write_bytes(b"no picture")
    result = runner.invoke(app, ["scan", str(pictures), "--resolution", "64"])
    assert result.exit_code == 3
    line = next(line for line in result.output.splitlines() if "broken.png" in line)
    assert "Fix:" in line
    assert "a run would not start" in result.output


@pytest.mark.parametrize(("name", "exit_code", "words"), [("nowhere", 3, "data folder not found"), ("empty", 3, "no pictures found")])
def test_folders_without_pictures(tmp_path: Path, name: str, exit_code: int, words: str) -> None:
    (tmp_path / "empty").mkdir()
    result = runner.invoke(app, ["scan", str(tmp_path / name)])
    assert result.exit_code == exit_code
    assert words in result.output
    assert "Traceback" not in result.output


def test_bad_settings_are_exit_code_2(pictures: Path) -> None:
    result = runner.invoke(app, ["scan", str(pictures), "--resolution", "24"])
    assert result.exit_code == 2
    assert "buckets.step = 16" in result.output


def test_the_page_is_written(pictures: Path, tmp_path: Path) -> None:
    target = tmp_path / "cats.html"
    result = runner.invoke(app, ["scan", str(pictures), "--resolution", "64", "--html", str(target)])
    assert result.exit_code == 0
    assert target.read_text().count("data:image/jpeg") == 3


def test_the_pictures_are_not_touched(pictures: Path) -> None:
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in pictures.iterdir()}
    runner.invoke(app, ["scan", str(pictures), "--resolution", "64"])
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in pictures.iterdir()} == before


def test_help_does_not_import_torch() -> None:
    code = "import sys, fluxsmith.cli.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
