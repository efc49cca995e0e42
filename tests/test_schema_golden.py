"""The generated reference in docs/ is that of the sources; `make docs` renews it."""

import json
from pathlib import Path

from fluxsmith.config.dump import json_schema, reference_markdown

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"


def test_reference_is_up_to_date() -> None:
    assert (REFERENCE / "config.md").read_text(encoding="utf-8") == reference_markdown(), "run `make docs`"


def test_schema_is_up_to_date() -> None:
    assert json.loads((REFERENCE / "schema.json").read_text(encoding="utf-8")) == json_schema(), "run `make docs`"
