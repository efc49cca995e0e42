"""A run config from TOML, JSON or a dict, with `a.b=c` changes: every problem at once, each with its place.

Values come from the schema, the family's preset, the file and the command line, the later winning:
`load_config("run.toml", ["train.steps=500"]).origins["train.steps"]` is "command line".
"""

import copy
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError

from fluxsmith.config import choice, positions
from fluxsmith.config.control import ControlConfig
from fluxsmith.config.foreign import CONTEXT_KEY as CLASSES_KEY
from fluxsmith.config.foreign import is_class_path
from fluxsmith.config.nearby import find_nearby
from fluxsmith.config.problems import problems_from
from fluxsmith.config.quant import QuantConfig
from fluxsmith.config.rules import findings
from fluxsmith.config.schema import RunConfig, as_plain
from fluxsmith.config.section import PluginConfig
from fluxsmith.config.sections import KeyPath, child, dotted
from fluxsmith.errors import ConfigError, Problem

VERSION = 1
FAMILIES, CONTROLS, QUANTISERS = "fluxsmith.models.family", "fluxsmith.controls", "fluxsmith.quant"
Kind = TypeVar("Kind", bound=PluginConfig)
Migration = tuple[int, Callable[[dict[str, Any]], str]]
MIGRATIONS: tuple[Migration, ...] = ()  # (version it starts from, change in place that returns a note), ascending


class LoadedConfig(NamedTuple):
    """A checked config and where its values come from."""

    config: RunConfig
    origins: dict[str, str]  # dotted key of every value -> "default", "preset flux1/dev", "run.toml:7:3" or "command line"
    source: str
    notes: tuple[str, ...] = ()


class _Source(NamedTuple):
    name: str
    tree: dict[str, Any]
    positions: dict[KeyPath, positions.Position]

    def place(self, path: KeyPath) -> str:
        """`name:line:column` of the key or of the nearest table above it."""
        for length in range(len(path), 0, -1):
            found = self.positions.get(path[:length])
            if found:
                return f"{self.name}:{found.line}:{found.column}"
        return self.name


def load_config(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, plugin_files: Sequence[str | Path] = ()
) -> LoadedConfig:
    """Reads, merges and checks; raises one ConfigError that holds every problem.

    `plugin_files` are paths of .py files with a `Config`, or `package.module.Class` that the run may import.
    """
    classes = tuple(str(plugin) for plugin in plugin_files if is_class_path(str(plugin)))
    files = tuple(Path(file) for file in plugin_files if str(file) not in classes)
    read = _read(source)
    tree = copy.deepcopy(read.tree)
    notes = _migrate(tree, read)
    problems = [
        Problem("there is no such file", str(file), fix="give --plugin the path of a .py file") for file in files if not file.is_file()
    ]
    if not isinstance(source, Mapping):
        find_nearby(tree, Path(source).expanduser().parent)
    changed, found = _override(tree, overrides)
    problems += found
    preset, from_preset = _fill_from_preset(tree)

    def locate(path: KeyPath) -> str:
        if any(path[: len(key)] == key for key in changed):
            return f"command line: {dotted(path)}"
        return read.place(path)

    def origin(path: KeyPath) -> str:
        if any(path[: len(key)] == key for key in changed):
            return "command line"
        if path in from_preset:
            return f"preset {preset}"
        return read.place(path) if _given(read.tree, path) else "default"

    try:
        config = RunConfig.model_validate(tree, context={choice.CONTEXT_KEY: files, CLASSES_KEY: classes})
    except ValidationError as error:
        problems += problems_from(error.errors(), tree, locate, files)
        raise _refusal(read.name, problems) from None
    problems += [Problem(one.what, locate(one.key), one.why, one.fix) for one in findings(config)]
    if problems:
        raise _refusal(read.name, problems)
    origins = {dotted(path): origin(path) for path in values(as_plain(config))}
    return LoadedConfig(config, origins, read.name, notes)


def load_model(source: str | Path | Mapping[str, Any]) -> PluginConfig:
    """Only the `model` section, of a run file (whose other sections are not looked at) or of `{"model": {...}}`.

    Raises one ConfigError that holds every problem.
    """
    read = _read(source)
    tree = {"model": dict(read.tree.get("model", {}))}
    if not isinstance(source, Mapping):
        find_nearby(tree, Path(source).expanduser().parent)
    try:
        section = TypeAdapter(Annotated[PluginConfig, choice.Choice(FAMILIES)])
        return section.validate_python(tree["model"])
    except ValidationError as error:
        located = [{**one, "loc": ("model", *one["loc"])} for one in error.errors()]
        raise _refusal(read.name, problems_from(located, tree, read.place)) from None


def load_controls(run: str | Path) -> list[ControlConfig]:
    """The `[[control]]` sections of a run file; empty if there are none. Raises one ConfigError that holds every problem."""
    read = _read(run)
    tree = {"control": copy.deepcopy(read.tree.get("control", []))}
    find_nearby(tree, Path(run).expanduser().parent)
    try:
        return TypeAdapter(list[Annotated[ControlConfig, choice.Choice(CONTROLS)]]).validate_python(tree["control"])
    except ValidationError as error:
        located = [{**one, "loc": ("control", *one["loc"])} for one in error.errors()]
        raise _refusal(read.name, problems_from(located, tree, read.place)) from None


def load_control(entry: Mapping[str, Any]) -> ControlConfig:
    """One `[[control]]` section from a dict with its keys. Raises one ConfigError that holds every problem."""
    return _section("control", CONTROLS, ControlConfig, entry)


def load_quant(entry: Mapping[str, Any]) -> QuantConfig:
    """A `quant` section from a dict with its keys. Raises one ConfigError that holds every problem."""
    return _section("quant", QUANTISERS, QuantConfig, entry)


def _section(name: str, package: str, kind: type[Kind], entry: Mapping[str, Any]) -> Kind:
    try:
        made = TypeAdapter(Annotated[PluginConfig, choice.Choice(package)]).validate_python(dict(entry))
    except ValidationError as error:
        located = [{**one, "loc": (name, *one["loc"])} for one in error.errors()]
        raise _refusal(name, problems_from(located, {name: dict(entry)}, dotted)) from None
    if not isinstance(made, kind):
        raise TypeError(f"{package} holds plug-ins whose Config is no {kind.__name__}")
    return made


def _refusal(name: str, problems: list[Problem]) -> ConfigError:
    return ConfigError("\n".join([f"{name} cannot be used:", *map(str, problems)]), problems=tuple(problems))


def values(tree: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Paths of all values of a plain config; a list of plain values is one value."""
    if isinstance(tree, dict) and tree:
        for key, inner in tree.items():
            yield from values(inner, (*path, key))
    elif isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        for index, inner in enumerate(tree):
            yield from values(inner, (*path, index))
    else:
        yield path


def _read(source: str | Path | Mapping[str, Any]) -> _Source:
    if isinstance(source, Mapping):
        return _Source("argument", dict(source), {})
    path = Path(source).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            "there is no such file", where=str(source), fix="check the path, or write one with `fluxsmith configure`"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError("the file is not UTF-8 text", where=f"{source}, byte {error.start}", fix="save it as UTF-8") from None
    except OSError as error:
        raise ConfigError("the file cannot be read", where=str(source), why=str(error.strerror), fix="give the path of a file") from None
    return _parse_json(str(source), text) if path.suffix == ".json" else _parse_toml(str(source), text)


def _parse_json(name: str, text: str) -> _Source:
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError("this is not JSON", where=f"{name}:{error.lineno}:{error.colno}", why=error.msg, fix="mend this place") from None
    except RecursionError:
        raise ConfigError("brackets are nested too deeply", where=name, fix="check that this is the file of a run") from None
    if not isinstance(tree, dict):
        raise ConfigError("the file holds no object", where=name, fix='begin with {"model": ...}')
    return _Source(name, tree, {})


def _parse_toml(name: str, text: str) -> _Source:
    text = text.replace("\r\n", "\n")
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", str(error))
        line, column = (found[1], found[2]) if found and found[1] else (text.count("\n") + 1, 1)
        why = str(error)[: found.start()] if found else str(error)
        fix = "mend this place; text values need quotes, and a key may stand only once"
        raise ConfigError("this is not TOML", where=f"{name}:{line}:{column}", why=why, fix=fix) from None
    except RecursionError:
        raise ConfigError("brackets are nested too deeply", where=name, fix="check that this is the file of a run") from None
    return _Source(name, tree, positions.key_positions(text))


def _migrate(tree: dict[str, Any], read: _Source) -> tuple[str, ...]:
    version = tree.setdefault("fluxsmith_config", VERSION)
    where = read.place(("fluxsmith_config",))
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ConfigError(f"fluxsmith_config = {version!r} is not a version", where=where, fix=f"write fluxsmith_config = {VERSION}")
    if version > VERSION:
        why = f"the file has version {version}, this fluxsmith knows up to {VERSION}"
        raise ConfigError("the file was written for a newer fluxsmith", where=where, why=why, fix="pip install --upgrade fluxsmith")
    notes = [change(tree) for start, change in MIGRATIONS if start >= version]
    tree["fluxsmith_config"] = VERSION
    return tuple(notes)


def _override(tree: dict[str, Any], overrides: Sequence[str]) -> tuple[list[KeyPath], list[Problem]]:
    changed: list[KeyPath] = []
    problems: list[Problem] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        path: KeyPath = tuple(int(part) if part.isdigit() else part.strip() for part in key.strip().split("."))
        if not equals or not all(part != "" for part in path):
            problems.append(Problem("this is no change of an option", f"command line: {text}", fix="write it as train.steps=500"))
            continue
        try:
            _put(tree, path, _value(value))
            changed.append(path)
        except ValueError as error:
            problems.append(Problem(str(error), f"command line: {text}", fix="check the key and the value; lists are counted from 0"))
    return changed, problems


def _value(text: str) -> Any:
    """TOML value syntax; a bare word is a string, `null` takes the key away."""
    text = text.strip()
    if text == "null":
        return None
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if text[:1] in ("[", "{", '"', "'"):
            raise ValueError(f"the value is not TOML: {error}") from None
        return text
    return parsed["value"] if set(parsed) == {"value"} else text


def _put(tree: dict[str, Any], path: KeyPath, value: Any) -> None:
    node: Any = tree
    for part, following in zip(path[:-1], path[1:], strict=True):
        inner = child(node, part)
        if inner is None:
            inner = [] if following == 0 else {}
            _store(node, part, inner)
        node = inner
    _store(node, path[-1], value)


def _store(node: Any, part: str | int, value: Any) -> None:
    if isinstance(node, dict):
        if value is None:
            node.pop(str(part), None)
        else:
            node[str(part)] = value
    elif isinstance(node, list) and isinstance(part, int) and part <= len(node):
        node[part : part + 1] = [] if value is None else [value]
    elif isinstance(node, list):
        raise ValueError(f"the list has {len(node)} entries, so there is no entry {part}")
    else:
        raise ValueError(f"{part} cannot be set: the key above it has a value of its own")


def _fill_from_preset(tree: dict[str, Any]) -> tuple[str, set[KeyPath]]:
    """Puts the defaults of the chosen preset where nothing was given; `sample.*.steps` means every entry of a list."""
    model = child(tree, "model")
    family = child(model, "type")
    if not isinstance(family, str) or family not in choice.plugin_names(FAMILIES):
        return "", set()
    presets = choice.literal(choice.folder_of(FAMILIES) / f"{family}.py", "PRESETS") or {}
    field = choice.config_class(FAMILIES, family).model_fields.get("preset")
    preset = child(model, "preset") or (field.default if field else None)
    defaults = child(presets.get(preset), "defaults") or {}
    filled: set[KeyPath] = set()
    for key, value in defaults.items():
        for path in _expand(tree, tuple(key.split("."))):
            if not _given(tree, path):
                _put(tree, path, copy.deepcopy(value))
                filled.add(path)
    return f"{family}/{preset}", filled


def _expand(tree: dict[str, Any], path: KeyPath) -> Iterator[KeyPath]:
    if "*" not in path:
        yield path
        return
    star = path.index("*")
    node: Any = tree
    for part in path[:star]:
        node = child(node, part)
    for index in range(len(node) if isinstance(node, list) else 0):
        yield from _expand(tree, (*path[:star], index, *path[star + 1 :]))


def _given(tree: Any, path: KeyPath) -> bool:
    for part in path[:-1]:
        tree = child(tree, part)
    return path[-1] in tree if isinstance(tree, dict) else child(tree, path[-1]) is not None
