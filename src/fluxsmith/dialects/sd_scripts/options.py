"""The options of one command: those of `--config_file` under those of the command line, each checked, each with its place.

sd-scripts takes whatever stands in a config file; here a wrong type or an unknown key is refused with file, line and column.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tomlkit

from fluxsmith.config.positions import key_positions
from fluxsmith.dialects.arguments import coerce, parse, unknown_option
from fluxsmith.dialects.base import Draft, Given, Row
from fluxsmith.dialects.sd_scripts.scripts import Script, option_rows
from fluxsmith.errors import ConfigError, Problem

NOT_WRITTEN = ("config_file", "output_config", "wandb_api_key")


class TextFile(NamedTuple):
    """A TOML or JSON file: its values, and where each stands."""

    name: str
    tree: Any
    positions: Mapping[tuple[str | int, ...], Any]

    def place(self, *path: str | int) -> str:
        """`file:line:column` of a key, or of the nearest table above."""
        for length in range(len(path), 0, -1):
            found = self.positions.get(tuple(path[:length]))
            if found:
                return f"{self.name}:{found.line}:{found.column}"
        return self.name


def read_text_file(path: Path, *, what: str) -> TextFile:
    """Reads TOML, or JSON by its ending. Raises ConfigError that names the place."""
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise ConfigError(f"{what} is not there", where=str(path), fix="check the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError("the file is not UTF-8 text", where=f"{path}, byte {error.start}", fix="save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{what} cannot be read", where=str(path), why=str(error.strerror), fix="give the path of a file") from None
    try:
        if path.suffix.lower() == ".json":
            return TextFile(str(path), json.loads(text), {})
        return TextFile(str(path), tomllib.loads(text), key_positions(text))
    except json.JSONDecodeError as error:
        raise ConfigError("this is not JSON", where=f"{path}:{error.lineno}:{error.colno}", why=error.msg, fix="mend this place") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("this is not TOML", where=str(path), why=str(error), fix="mend this place; text values need quotes") from None


def read_options(script: Script, words: Sequence[str]) -> Draft:
    """The options given, and what is wrong with them in the draft's problems, so that `finish` tells it with everything else.

    Raises ConfigError for words that cannot be read at all; `--output_config` is `written_config`'s business.
    """
    rows = option_rows(script.name)
    given, problems = parse(rows, words, title=script.name)
    config = given.get("config_file")
    if config is not None and "output_config" not in given:
        below, found = _from_file(Path(config.value), rows)
        given, problems = {**below, **given}, problems + found
    draft = Draft(rows, given, script=script.name)
    draft.problems += problems
    return draft


def _toml(path: Path) -> Path:
    """`my_options` means my_options.toml."""
    if not path.name:
        raise ConfigError("--config_file has no name", fix="write --config_file my_options.toml")
    return path if path.suffix == ".toml" else path.with_name(path.name + ".toml")


def _from_file(path: Path, rows: Mapping[str, Row]) -> tuple[dict[str, Given], list[Problem]]:
    path = _toml(path)
    file = read_text_file(path, what="the file of --config_file")
    given: dict[str, Given] = {}
    problems: list[Problem] = []
    for keys, value in _flattened(file.tree):
        where, row = file.place(*keys), rows.get(keys[-1])
        if row is None:
            problems.append(unknown_option(keys[-1], rows, where))
            continue
        converted, problem = coerce(row, value, where)
        if problem:
            problems.append(problem)
        elif row.type != "flag" or converted:
            given[row.name] = Given(converted, where)
    return given, problems


def _flattened(tree: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Any]]:
    """Tables are laid out flat, one level deep: their names mean nothing."""
    out: list[tuple[tuple[str, ...], Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out += [((key, inner), below) for inner, below in value.items()]
        else:
            out.append(((key,), value))
    return out


def written_config(draft: Draft) -> Path | None:
    """With `--output_config`, writes the options that differ from their defaults to `--config_file`; returns the file."""
    if not draft["output_config"]:
        return None
    draft.finish(draft.script)
    if not draft["config_file"]:
        raise ConfigError("--output_config needs a file to write", fix="add --config_file my_options.toml")
    path = _toml(Path(draft["config_file"]))
    if path.exists():
        raise ConfigError("the file is there already", where=str(path), fix="choose another name for --config_file")
    differing = {
        name: given.value for name, given in draft.given.items() if name not in NOT_WRITTEN and given.value != draft.rows[name].default
    }
    path.write_text(tomlkit.dumps(differing), encoding="utf-8")
    return path
