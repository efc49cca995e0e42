"""What foreign front ends share: an option as a row of data, the draft of a run file, and the report of what became of each option.

A dialect reads its rows from a TOML file, lets `arguments.py` read a command line by them, and fills a `Draft`:
`draft.put("optim.lr", 1e-4, option="--learning_rate")`, `draft.note(...)`, `draft.refuse(...)`.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fluxsmith.errors import ConfigError, Problem

Fate = Literal["kept", "ignored", "refused"]
Kind = Literal["str", "int", "float", "flag", "length", "positional"]  # length: steps, a share below 1, or a percentage


@dataclass(frozen=True)
class Row:
    """One option of a foreign program. `to` is the option of a run file that takes its value, `by` the function that places it."""

    name: str
    group: str
    type: Kind
    scripts: tuple[str, ...]
    fate: Fate
    help: str
    default: Any = None
    choices: tuple[Any, ...] = ()
    nargs: str = ""
    short: str = ""
    to: str = ""
    by: str = ""
    why: str = ""
    advice: str = ""

    @property
    def flag(self) -> str:
        """As it is written on a command line."""
        return self.name if self.type == "positional" else f"--{self.name}"


@lru_cache(maxsize=8)
def read_rows(file: Path) -> tuple[Row, ...]:
    """The rows of an options.toml."""
    tables: list[dict[str, Any]] = tomllib.loads(file.read_text(encoding="utf-8"))["option"]
    return tuple(Row(**{**table, "scripts": tuple(table["scripts"]), "choices": tuple(table.get("choices", ()))}) for table in tables)


def rows_of(rows: Iterable[Row], script: str) -> dict[str, Row]:
    """Name -> row of the options that one script has."""
    return {row.name: row for row in rows if script in row.scripts}


class Line(NamedTuple):
    """One entry of a report."""

    option: str
    text: str


@dataclass
class Report:
    """What became of the options that were given, and of defaults that we would set otherwise."""

    kept: list[Line] = field(default_factory=list)
    ignored: list[Line] = field(default_factory=list)
    differs: list[Line] = field(default_factory=list)
    notes: list[Line] = field(default_factory=list)

    def lines(self) -> list[str]:
        """As it is printed: notes, ignored options, defaults to think about."""
        out = [f"note: {line.option}: {line.text}" if line.option else f"note: {line.text}" for line in self.notes]
        out += [f"ignored: {line.option}: {line.text}" for line in self.ignored]
        return out + [f"default: {line.option}: {line.text}" for line in self.differs]

    def as_record(self) -> dict[str, list[dict[str, str]]]:
        """JSON-ready."""
        return {
            name: [line._asdict() for line in lines]
            for name, lines in (("kept", self.kept), ("ignored", self.ignored), ("differs", self.differs), ("notes", self.notes))
        }


class Given(NamedTuple):
    """The value of an option and where it stands: `--lr`, or `my.toml:3:1`."""

    value: Any
    where: str


class Draft:
    """A run file in the making, with the options it is made from and everything that has to be said about them."""

    def __init__(self, rows: Mapping[str, Row], given: Mapping[str, Given], *, script: str = "") -> None:
        self.script = script
        self.rows = rows
        self.given = given
        self.tree: dict[str, Any] = {}
        self.origins: dict[str, str] = {}  # dotted key -> the option it comes from
        self.report = Report()
        self.problems: list[Problem] = []

    def __getitem__(self, name: str) -> Any:
        """The value of an option: given, or the foreign default; None for an option that the script lacks."""
        if name in self.given:
            return self.given[name].value
        row = self.rows.get(name)
        if row is None:
            return None
        return False if row.type == "flag" else list(row.default) if isinstance(row.default, list) else row.default

    def has(self, name: str) -> bool:
        """Was the option given, other than by its default?"""
        return name in self.given

    def where(self, name: str) -> str:
        """Where it was given, for messages."""
        return self.given[name].where if name in self.given else f"--{name}"

    def put(self, key: str, value: Any, option: str = "") -> None:
        """Set `a.b.c`; tables in between are made."""
        *path, last = key.split(".")
        place = self.tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
        if option:
            self.origins[key] = option

    def get(self, key: str) -> Any:
        """The value at `a.b.c`, or None."""
        place: Any = self.tree
        for part in key.split("."):
            place = place.get(part) if isinstance(place, dict) else None
        return place

    def note(self, option: str, text: str) -> None:
        """Something a user should know."""
        self.report.notes.append(Line(option, text))

    def refuse(self, where: str, what: str, fix: str, why: str = "") -> None:
        """Something that cannot be done; all of them are raised together."""
        self.problems.append(Problem(what, where, why, fix))

    def apply_rows(self) -> None:
        """Options that take their value straight; reasons of ignored ones; cures of refused ones; advice on defaults."""
        for name, row in self.rows.items():
            if row.to:
                self._straight(name, row)
            if name not in self.given:
                if row.advice:
                    shown = "off" if self[name] in (None, False, "") else self[name]
                    self.report.differs.append(Line(row.flag, f"{shown}: {row.advice}"))
                continue
            shown = self.given[name].where
            if row.fate == "ignored":
                self.report.ignored.append(Line(row.flag, row.why))
            elif row.fate == "refused":
                if self[name] not in (None, False, ""):
                    self.refuse(shown, f"{row.flag} cannot be done", row.why)
            else:
                self.report.kept.append(Line(row.flag, row.to or f"see {row.by}"))

    def _straight(self, name: str, row: Row) -> None:
        value = self[name]
        if value is None or value == "" or (row.type == "flag" and not value):
            return
        self.put(row.to, value, row.flag)

    def finish(self, title: str) -> None:
        """Raise one ConfigError if anything was refused."""
        if self.problems:
            problems = tuple(dict.fromkeys(self.problems))
            raise ConfigError("\n".join([f"{title} cannot be translated:", *map(str, problems)]), problems=problems)
