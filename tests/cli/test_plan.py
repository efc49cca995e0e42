"""`fluxsmith plan`: phases, choices and exit codes, without any model file and with one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxsmith.cli import main as cli

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
GIB = 2**30


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert cli.run(["plan", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.ledger("KS-50")
@pytest.mark.ledger("FS-03")
@pytest.mark.parametrize("card", [24, 16, 12, 10, 8])
def test_the_recipes_fit_their_cards(card: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, str(RECIPES / f"flux-lora-{card}gb.toml"))
    assert found["card"] == card
    assert max(phase["device"] for phase in found["phases"]) <= card * GIB
    assert found["settings"]["trained"] == 3_502_080 * 16
    assert "sizes are those of FLUX.1-dev" in found["notes"][0]
    assert f"memory plan for {card} GiB" in found["notes"][1]
    assert found["rates"]["RTX 4090"]["kind"] == "compute-bound"
    assert 0.5 < found["rates"]["RTX 4090"]["seconds"] < 5


def test_what_does_not_fit_is_exit_3_and_says_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(RECIPES / "flux-lora-24gb.toml")
    found = answer(capsys, recipe, "--card", "8GB", code=3)
    assert found["card"] == 8
    assert found["settings"]["streamed"] > 0
    assert any("'encode captions' needs 9.9 of 8 GiB: quant.text_encoders = true" in note for note in found["notes"])
    assert cli.run(["plan", recipe, "--card", "large"]) == 2
    assert "--card large is no size. Fix: write for example --card 12GB" in capsys.readouterr().err


def test_sizes_come_from_the_file_where_there_is_one(
    tiny_run_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run_file(tmp_path / "run", {"memory.checkpointing": True})
    found = answer(capsys, str(run))
    assert found["notes"] == []
    assert found["card"] is None
    assert found["settings"]["boundary"] == found["settings"]["blocks"] < 57
    assert cli.run(["plan", str(run)]) == 0
    text = capsys.readouterr().out
    assert "Predicted peaks" in text
    assert next(phase["parts"]["text encoders"] for phase in found["phases"] if phase["name"] == "encode captions") < GIB / 10
    assert not (tmp_path / "run").exists(), "a plan leaves nothing"
