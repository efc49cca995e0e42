"""TOML that loads to the same config, the schema of all configs, the reference."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, PositiveInt

from fluxsmith.config.dump import json_schema, reference_markdown, to_toml, type_text
from fluxsmith.config.load import load_config

RUN = {
    "model": {"type": "flux1", "path": 'a "quoted" \\ path.safetensors'},
    "train": {"steps": 10, "ema": {"decay": 0.99}},
    "data": [
        {"type": "folder", "path": "cats", "resolution": [512, 768], "captions": {"prefix": "ünïcode\nline"}},
        {"type": "folder", "path": "~/dogs"},
    ],
    "sample": [{"prompt": "a cat", "every": 5}, {"prompt": "", "cfg": 2.0, "negative": "blur"}],
    "optim": {"type": "torch", "lr": 1e-5},
    "run": {"dir": "runs/cats"},
}


def test_toml_loads_to_an_equal_config(tmp_path: Path) -> None:
    loaded = load_config(RUN)
    file = tmp_path / "run.toml"
    file.write_text(to_toml(loaded.config), encoding="utf-8")
    again = load_config(file)
    assert again.config == loaded.config
    assert to_toml(again.config) == to_toml(loaded.config)
    assert "[[data]]" in file.read_text(encoding="utf-8")


def test_only_set_values(tmp_path: Path) -> None:
    loaded = load_config(RUN)
    text = to_toml(loaded.config, only_set=True)
    assert "weight_decay" not in text
    assert "captions.empty" not in text
    file = tmp_path / "short.toml"
    file.write_text(text, encoding="utf-8")
    assert load_config(file).config == loaded.config


def test_schema_covers_fixed_sections_and_plugins() -> None:
    schema = json_schema()
    assert schema["additionalProperties"] is False
    (family,) = [one for one in schema["properties"]["model"]["oneOf"] if one["properties"]["type"]["const"] == "flux1"]
    assert family["properties"]["path"]["description"]
    assert schema["properties"]["model"]["description"]
    assert set(schema["required"]) == {"model", "train", "data", "run"}


def test_reference_has_a_meaning_for_every_option() -> None:
    text = reference_markdown()
    for heading in ("## `[train]`", '## `[model]` type = "flux1"', '## `[[data]]` type = "folder"', "## `[[sample]]`"):
        assert heading in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 80
    assert [row for row in rows if row.endswith("|  |")] == []


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (PositiveInt, "whole number > 0"),
        (Annotated[float, Field(ge=0, le=1)], "number >= 0 and <= 1"),
        (Literal["a", "b"], 'one of "a", "b"'),
        (int | tuple[int, int] | None, "whole number or [whole number, whole number]"),
        (tuple[str, ...], "list of text"),
        (dict[str, bool | Path], "table of true or false or path"),
    ],
)
def test_types_in_words(hint: object, text: str) -> None:
    assert type_text(hint) == text
