"""Where each key of a TOML text stands. `tomllib` reads values but forgets places, so a second, small scan finds them.

The text has been accepted by `tomllib` before, so the scan only has to follow valid TOML:
`key_positions('[train]\\nsteps = 5')` gives `{("train",): (1, 1), ("train", "steps"): (2, 1)}`.
"""

import re
from typing import NamedTuple

Path = tuple[str | int, ...]
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
STRING = re.compile(r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'', re.DOTALL)
PLAIN_VALUE = re.compile(r"[^,\]}\n#]*")


class Position(NamedTuple):
    """One-based line and column."""

    line: int
    column: int


def key_positions(text: str) -> dict[Path, Position]:
    """Positions of all keys, table headers and array elements of a valid TOML text, by path."""
    scanner = _Scanner(text)
    scanner.document()
    return scanner.positions


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.positions: dict[Path, Position] = {}
        self.last_index: dict[Path, int] = {}  # of arrays of tables

    def document(self) -> None:
        table: Path = ()
        self._blank()
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                table = self._header()
            else:
                self._pair(table)
            self._blank()

    def _header(self) -> Path:
        start, is_array = self.at, self.text.startswith("[[", self.at)
        self.at += 2 if is_array else 1
        *parents, last = self._key()
        path = (*self._resolve(tuple(parents), start), last)
        if is_array:
            self.last_index[path] = self.last_index.get(path, -1) + 1
            self._note(path, start)
            path = (*path, self.last_index[path])
        elif path in self.last_index:
            path = (*path, self.last_index[path])
        self._note(path, start)
        self._blank()
        self.at += 2 if is_array else 1
        return path

    def _resolve(self, parts: tuple[str, ...], start: int) -> Path:
        path: Path = ()
        for part in parts:
            path = (*path, part)
            self._note(path, start)
            if path in self.last_index:
                path = (*path, self.last_index[path])
        return path

    def _pair(self, table: Path) -> None:
        start = self.at
        path = table
        for part in self._key():
            path = (*path, part)
            self._note(path, start)
        self._blank()
        self.at += 1  # =
        self._value(path)

    def _value(self, path: Path) -> None:
        self._blank()
        first = self.text[self.at]
        if first == "{":
            self._inner(path, "}")
        elif first == "[":
            self._inner(path, "]")
        elif first in "\"'":
            self._string()
        else:
            self._match(PLAIN_VALUE)

    def _inner(self, path: Path, end: str) -> None:
        """Members of an inline table (`end` is a brace) or of an array."""
        self.at += 1
        index = 0
        self._blank()
        while self.text[self.at] != end:
            if end == "}":
                self._pair(path)
            else:
                self._note((*path, index), self.at)
                self._value((*path, index))
            index += 1
            self._blank()
            if self.text[self.at] == ",":
                self.at += 1
                self._blank()
        self.at += 1

    def _key(self) -> list[str]:
        parts = []
        while True:
            self._blank()
            parts.append(self._string()[1:-1] if self.text[self.at] in "\"'" else self._match(BARE_KEY))
            self._blank()
            if self.text[self.at : self.at + 1] != ".":
                return parts
            self.at += 1

    def _string(self) -> str:
        return self._match(STRING)

    def _blank(self) -> None:
        self._match(BLANK)

    def _match(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.text, self.at)
        if found is None:  # cannot happen in a text that tomllib has accepted
            raise ValueError(f"cannot follow the TOML text at character {self.at}")
        self.at = found.end()
        return found.group()

    def _note(self, path: Path, start: int) -> None:
        line_start = self.text.rfind("\n", 0, start) + 1
        self.positions.setdefault(path, Position(self.text.count("\n", 0, start) + 1, start - line_start + 1))
