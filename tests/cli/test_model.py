"""`fluxsmith model identify`: text and JSON on stdout, exit 4 for what is unreadable or unknown, and no torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fluxsmith.cli.model import app


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["identify", *map(str, arguments)])
    return result.exit_code, result.stdout


def test_one_file_is_one_object(fixtures_root: Path) -> None:
    path = fixtures_root / "flux-dev-tiny/weights.safetensors"
    code, text = run(path, "--json")
    record = json.loads(text)
    assert code == 0
    assert {"path": str(path), "family": "flux1", "role": "dit", "variant": "dev", "problems": []}.items() <= record.items()
    assert record["sizes"]["double_blocks"] == 2


@pytest.mark.ledger("FS-06")
def test_several_files_are_a_list_and_a_bad_one_gives_exit_4(fixtures_root: Path, tmp_path: Path) -> None:
    for name in ("broken.safetensors", "a.ckpt"):
        (tmp_path / name).write_bytes(b"x" * 50)
    code, text = run(fixtures_root / "t5-tiny/weights.safetensors", tmp_path / "broken.safetensors", tmp_path / "a.ckpt", "--json")
    records = json.loads(text)
    assert code == 4
    assert [record["role"] for record in records] == ["t5xxl", "unknown", "unknown"]
    assert "not a safetensors file" in records[1]["problems"][0]
    assert "pickle is not converted" in records[2]["problems"][0]


def test_text(fixtures_root: Path) -> None:
    code, text = run(fixtures_root / "clip_l-tiny/weights.safetensors")
    assert code == 0
    assert "a CLIP-L text encoder (text_model.*)" in text
    assert "52 tensors" in text


def test_torch_is_not_imported(fixtures_root: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from fluxsmith.cli.model import app;"
        f"r = CliRunner().invoke(app, ['identify', {str(fixtures_root / 'ae-tiny/weights.safetensors')!r}]);"
        "sys.exit(r.exit_code or ('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
