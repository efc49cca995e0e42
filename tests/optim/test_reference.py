"""docs/reference/optimizers.md against the code: families, their names, what works inside the backward pass, names elsewhere."""

import re
from pathlib import Path
from typing import get_args

from fluxsmith.config.choice import config_class, plugin_names
from fluxsmith.config.schema import ScheduleConfig

FOLDER = "fluxsmith.optim"
TEXT = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "optimizers.md").read_text(encoding="utf-8")


def table(title: str) -> list[list[str]]:
    lines = [line for line in TEXT.partition(f"## {title}\n")[2].partition("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names_of(kind: str) -> set[str]:
    fields = config_class(FOLDER, kind).model_fields
    return set(get_args(fields["name"].annotation)) if "name" in fields else set()


def test_families() -> None:
    rows = {row[0].strip("`"): row for row in table("Families")}
    assert set(rows) == set(plugin_names(FOLDER))
    for kind, row in rows.items():
        config = config_class(FOLDER, kind).model_validate({"type": kind, **({"path": "a.B"} if kind == "imported" else {})})
        assert config.is_per_tensor() is (row[3] == "yes"), kind  # type: ignore[attr-defined]  # all of them have it
        if kind not in ("bnb", "schedulefree"):  # told in words
            assert {name.strip() for name in row[1].split(",")} - {""} == names_of(kind), kind
        assert names_of(kind) <= set(re.findall(r"\w+", row[1])) or kind == "bnb"


def test_names_elsewhere_lead_to_names_here() -> None:
    for row in table("Names elsewhere"):
        for part in row[2].partition(" (")[0].split(";"):
            kind, _, names = part.partition("`,")
            kind = kind.strip(" `").partition("`")[0]
            assert kind in plugin_names(FOLDER), row
            if names:
                found = {name for name in re.findall(r"\w+", names.partition("with")[0]) if name != "both"}
                assert found <= names_of(kind), row


def test_schedules() -> None:
    assert {row[0] for row in table("Schedules")} == set(get_args(ScheduleConfig.model_fields["name"].annotation))
    fields = set(ScheduleConfig.model_fields)
    assert all(option in fields for row in table("Schedules") for option in re.findall(r"`(\w+)`", row[2]))
