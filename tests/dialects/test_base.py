"""Drafts, their reports, and the refusal of everything at once."""

import pytest

from fluxsmith.dialects.base import Draft, Given, Row
from fluxsmith.errors import ConfigError

ROWS = {
    "lr": Row("lr", "g", "float", ("x",), "kept", "h", default=2e-6, to="optim.lr", advice="1e-4 is better"),
    "on": Row("on", "g", "flag", ("x",), "kept", "h", to="memory.compile"),
    "old": Row("old", "g", "flag", ("x",), "ignored", "h", why="nothing reads it"),
    "bad": Row("bad", "g", "str", ("x",), "refused", "h", why="write --good"),
}


def draft(**given: object) -> Draft:
    made = Draft(ROWS, {name: Given(value, f"--{name}") for name, value in given.items()})
    made.apply_rows()
    return made


def test_foreign_defaults_are_written_and_advised_against() -> None:
    made = draft()
    assert made.tree == {"optim": {"lr": 2e-6}}
    assert made.report.lines() == ["default: --lr: 2e-06: 1e-4 is better"]


def test_a_value_that_was_given_is_not_advised_against() -> None:
    made = draft(lr=2e-6, on=True)
    assert made.tree == {"optim": {"lr": 2e-6}, "memory": {"compile": True}}
    assert made.report.differs == []
    assert made.origins == {"optim.lr": "--lr", "memory.compile": "--on"}


def test_ignored_and_refused() -> None:
    made = draft(old=True, bad="x")
    made.refuse("here", "second", "mend it")
    assert made.report.lines()[0] == "ignored: --old: nothing reads it"
    with pytest.raises(ConfigError) as error:
        made.finish("the command")
    assert [str(problem) for problem in error.value.problems] == [
        "--bad: --bad cannot be done. Fix: write --good",
        "here: second. Fix: mend it",
    ]


def test_get_and_put() -> None:
    made = draft()
    made.put("a.b.c", 1, "--x")
    assert (made.get("a.b.c"), made.get("a.x"), made.get("optim.lr.x")) == (1, None, None)
    assert made["nothing"] is None
