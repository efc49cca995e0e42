"""`fluxsmith lora inspect` and `check`: what they print, and exit code 4 for a broken file."""

import json
from pathlib import Path

import pytest

from fluxsmith.cli.main import run
from fluxsmith.io.safetensors import open_weights, save_weights


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_inspect_text(fixtures_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "lora", "inspect", fixtures_root / "flux-dev-lora-tiny/kohya.safetensors")
    assert code == 0
    for text in ("lora in kohya names", "29 of dit", "single_blocks: 0-2", "img_attn: rank 3, alpha 2", "double_blocks.1 "):
        assert text in out


def test_inspect_json(fixtures_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "lora", "inspect", fixtures_root / "flux-dev-lora-tiny/ai_toolkit.safetensors", "--json")
    record = json.loads(out)
    assert code == 0
    assert (record["kind"], record["format"], record["ranks"]["single"]) == ("lora", "peft", {"3": 6})


def test_check(fixtures_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora, base = fixtures_root / "flux-dev-lora-tiny/kohya.safetensors", fixtures_root / "flux-dev-tiny/weights.safetensors"
    code, out, _ = call(capsys, "lora", "check", lora, "--base", base)
    assert code == 0
    assert "sound" in out
    assert "loads in sd-scripts, ComfyUI, Forge, diffusers" in out
    code, out, _ = call(capsys, "lora", "check", lora, "--json")
    assert json.loads(out)["verdict"]["loads_in"] == ["sd-scripts", "ComfyUI", "Forge", "diffusers"]


def test_broken_files_end_with_4(fixtures_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_weights(fixtures_root / "flux-dev-lora-tiny/kohya.safetensors") as weights:
        tensors = {name: weights.tensor(name) for name in list(weights)[:-1]}
    save_weights(tmp_path / "part.safetensors", tensors, {})
    code, out, _ = call(capsys, "lora", "check", tmp_path / "part.safetensors")
    assert code == 4
    assert "broken" in out
    assert "has no" in out
    assert call(capsys, "lora", "inspect", tmp_path / "part.safetensors")[0] == 4
    code, _, err = call(capsys, "lora", "check", fixtures_root / "t5-tiny/weights.safetensors")
    assert code == 4
    assert "an adapter was expected" in err
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "part.safetensors").read_bytes()[:-10])
    code, _, err = call(capsys, "lora", "check", tmp_path / "cut.safetensors")
    assert code == 4
    assert "truncated" in err


@pytest.mark.ledger("FS-06")
def test_wrong_base_is_named(fixtures_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora, ae = fixtures_root / "flux-dev-lora-tiny/kohya.safetensors", fixtures_root / "ae-tiny/weights.safetensors"
    code, _, err = call(capsys, "lora", "check", lora, "--base", ae)
    assert code == 4
    assert "this is an autoencoder" in err
