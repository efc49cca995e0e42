"""A foreign command line read by its rows, as argparse would: abbreviations, `--a=b`, lists, the last of several wins.

Values are text first, then checked and turned into their types, so that every mistake is found at once.
"""

import argparse
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from fluxsmith.dialects.base import Given, Row
from fluxsmith.errors import ConfigError, Problem

CUTOFF = 0.6


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, where=self.prog, fix=f"{self.prog} --help lists the options")


def parse(rows: Mapping[str, Row], words: Sequence[str], *, title: str) -> tuple[dict[str, Given], list[Problem]]:
    """Option -> its value, and everything that is wrong with the words. Raises ConfigError where a value is missing."""
    parser = _Parser(prog=title, add_help=False)
    for row in rows.values():
        if row.type == "positional":
            parser.add_argument(row.name, nargs="?", default=argparse.SUPPRESS)
            continue
        names = (row.short, row.flag) if row.short else (row.flag,)
        if row.type == "flag":
            parser.add_argument(*names, dest=row.name, action="store_true", default=argparse.SUPPRESS)
        else:
            parser.add_argument(*names, dest=row.name, default=argparse.SUPPRESS, nargs=row.nargs or None)
    found, rest = parser.parse_known_args(list(words))
    problems = [unknown_option(word, rows) for word in rest if word.startswith("-")]
    if rest and not problems:
        problems.append(Problem(f"{rest[0]!r} belongs to no option", title, fix="put it behind its option, or quote values with spaces"))
    given = {}
    for name, text in vars(found).items():
        value, problem = coerce(rows[name], text, rows[name].flag)
        if problem:
            problems.append(problem)
        else:
            given[name] = Given(value, rows[name].flag)
    return given, problems


def unknown_option(word: str, rows: Mapping[str, Row], where: str = "") -> Problem:
    """`--learning_rat` is no option: the nearest name."""
    name = word.lstrip("-").partition("=")[0]
    close = nearest(name, rows)
    fix = f"write --{close}" if close else "leave it out; --help lists the options"
    return Problem(f"{word.partition('=')[0]} is not an option", where, fix=fix)


def nearest(name: str, names: Iterable[str]) -> str:
    """The name that was probably meant, or an empty string."""
    known = list(names)
    lowered = name.lower().replace("-", "_")
    if lowered in known:
        return lowered
    close = difflib.get_close_matches(lowered, known, 1, CUTOFF)
    return close[0] if close else ""


def coerce(row: Row, value: Any, where: str) -> tuple[Any, Problem | None]:
    """A value in the row's type, or what is wrong with it. Text comes from a command line, other values from a file."""
    if value is None or (value == "None" and None in row.choices):
        return None, None
    if row.nargs == "*" or row.nargs == "+":
        items = value if isinstance(value, list) else [value]
        pairs = [_one(row, item, where) for item in items]
        problem = next((problem for _, problem in pairs if problem), None)
        return [item for item, _ in pairs], problem
    return _one(row, value, where)


def _one(row: Row, value: Any, where: str) -> tuple[Any, Problem | None]:
    try:
        converted = CONVERT[row.type](value)
    except (ValueError, TypeError):
        return None, Problem(f"{row.flag} = {value!r} is not {WORDS[row.type]}", where, fix=f"give {WORDS[row.type]}")
    if row.choices and converted not in row.choices:
        close = nearest(str(converted), map(str, row.choices))
        fix = f"write {close}" if close else f"choose one of {', '.join(map(str, row.choices))}"
        return None, Problem(f"{row.flag} has no choice {value!r}", where, fix=fix)
    return converted, None


def _text(value: Any) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise TypeError(value)
    return str(value)


def _int(value: Any) -> int:
    if isinstance(value, bool) or isinstance(value, float) and not value.is_integer():
        raise TypeError(value)
    return int(value)


def _float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError(value)
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(value)
    return value


def _length(value: Any) -> float:
    """Steps, a share of the run below 1, or a percentage of it."""
    if isinstance(value, str) and value.endswith("%"):
        share = float(value[:-1]) / 100
        if share >= 1:
            raise ValueError(value)
        return share
    number = _float(value)
    if number < 0:
        raise ValueError(value)
    return int(number) if number >= 1 else number


CONVERT = {"str": _text, "positional": _text, "int": _int, "float": _float, "flag": _flag, "length": _length}
WORDS = {
    "str": "text",
    "positional": "text",
    "int": "a whole number",
    "float": "a number",
    "flag": "true or false",
    "length": "a number of steps, a share of the run below 1, or a percentage below 100%",
}
