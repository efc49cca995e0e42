"""What is wrong with a config, said so that it can be mended: place, value, the nearest name, the cure.

Turns pydantic's findings into `Problem`s; several findings about one value (a union of types) become one.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fluxsmith.config.sections import Files, KeyPath, child, dotted, field_at, leaves, section_at
from fluxsmith.errors import Problem

Locate = Callable[[KeyPath], str]


def problems_from(errors: Iterable[Mapping[str, Any]], tree: dict[str, Any], locate: Locate, files: Files = ()) -> list[Problem]:
    """One `Problem` for every wrong place, in the order of the config's sections."""
    grouped: dict[KeyPath, list[Mapping[str, Any]]] = {}
    for error in errors:
        grouped.setdefault(_path(error, tree), []).append(error)
    return [_problem(path, found, tree, locate, files) for path, found in grouped.items()]


def _path(error: Mapping[str, Any], tree: Any) -> KeyPath:
    """Where the value stands in `tree`: pydantic's location without the names of union members."""
    loc: KeyPath = tuple(error["loc"])
    if error["type"] == "missing" and isinstance(loc[-1], str):  # not an entry of a list that is too short
        return (*_path({"loc": loc[:-1], "type": ""}, tree), loc[-1])
    path: KeyPath = ()
    for part in loc:
        if child(tree, part) is None and not (isinstance(tree, dict) and part in tree):
            break
        path, tree = (*path, part), child(tree, part)
    return path or loc


def _problem(path: KeyPath, errors: list[Mapping[str, Any]], tree: dict[str, Any], locate: Locate, files: Files) -> Problem:
    error, where = errors[0], locate(path)
    kind, key = error["type"], dotted(path)
    if kind == "extra_forbidden":
        return Problem(f"{key} is not an option", where, fix=_unknown_fix(path, tree, files))
    if kind == "missing" and isinstance(path[-1], str) and error["loc"][-1] == path[-1]:
        return Problem(f"{key} is missing", locate(path[:-1]), fix=f"add {key}: {_purpose(path, tree, files)}")
    if kind == "plugin_unknown":
        nearest, names = error["ctx"]["nearest"], error["ctx"]["names"]
        fix = f'write "{nearest}"' if nearest else f"choose one of: {names}"
        why = f"available: {names}" if nearest else ""
        return Problem(f'{key}.type = "{error["ctx"]["given"]}" does not exist', locate((*path, "type")), why, fix)
    if kind == "plugin_missing_type":
        return Problem(f"{key}.type is missing", where, fix=f"add one of: {error['ctx']['names']}")
    value = error["input"]
    return Problem(f"{key} = {_shown(value)} is not valid", where, _reason(errors), _value_fix(path, errors, value, tree, files))


def _reason(errors: list[Mapping[str, Any]]) -> str:
    reasons = []
    for error in errors:
        text = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
        reasons.append(text[:1].lower() + text[1:])
    return ", or ".join(dict.fromkeys(reasons))


def _value_fix(path: KeyPath, errors: list[Mapping[str, Any]], value: Any, tree: dict[str, Any], files: Files) -> str:
    expected = [name for error in errors if error["type"] in ("literal_error", "enum") for name in re.findall(r"'([^']*)'", error["msg"])]
    nearest = difflib.get_close_matches(str(value).lower(), expected, 1, 0.5)
    if nearest:
        return f'write "{nearest[0]}"'
    if expected:
        return f"choose one of: {', '.join(expected)}"
    return f"change {dotted(path)}: {_purpose(path, tree, files)}"


def _unknown_fix(path: KeyPath, tree: dict[str, Any], files: Files) -> str:
    name, section = str(path[-1]), section_at(path[:-1], tree, files)
    here = list(section.model_fields) if section else []
    nearest = difflib.get_close_matches(name, here, 1, 0.75)
    if nearest:
        return f"write {dotted((*path[:-1], nearest[0]))}"
    elsewhere = [other for other in leaves(tree, files) if other[-1] == name]
    if elsewhere:
        return f"write {dotted(elsewhere[0])}"
    nearest = difflib.get_close_matches(name, here, 1, 0.55)
    if nearest:
        return f"write {dotted((*path[:-1], nearest[0]))}"
    place = dotted(path[:-1]) or "a run"
    return f"remove it; {place} has: {', '.join(here)}" if here else "remove it"


def _purpose(path: KeyPath, tree: dict[str, Any], files: Files) -> str:
    field = field_at(path, tree, files)
    text = (field.description if field else None) or "see docs/reference/config.md"
    return text.rstrip(".").replace("\n", " ")


def _shown(value: Any) -> str:
    text = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
