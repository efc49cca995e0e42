"""Help texts and the reference page of the options."""

from pathlib import Path

from fluxsmith.dialects.base import read_rows
from fluxsmith.dialects.sd_scripts.scripts import OPTIONS, SCRIPTS
from fluxsmith.dialects.sd_scripts.show import PLACES, is_ready, overview, reference, script_help

PAGE = Path(__file__).resolve().parents[3] / "docs" / "reference" / "sd-scripts-options.md"


def test_the_reference_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run `make docs`"


def test_every_kept_option_of_a_training_names_its_place() -> None:
    rows = [row for row in read_rows(OPTIONS) if row.fate == "kept" and any(name.startswith("flux_train") for name in row.scripts)]
    assert [row.name for row in rows if not row.to and row.by not in PLACES] == []


def test_only_what_is_there_is_listed() -> None:
    text = overview()
    assert all((script.name in text) == is_ready(script) for script in SCRIPTS)
    assert "--guidance FLOAT" in script_help(next(script for script in SCRIPTS if script.kind == "draw"))
