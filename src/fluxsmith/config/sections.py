"""Looking into the types of a config by path: which section is a table, which options does it have, what do they mean.

Used by messages (nearest name, what an option is for) and by the reference; a plug-in's options are known from its `type`.
"""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from fluxsmith.config.choice import Choice
from fluxsmith.config.schema import RunConfig
from fluxsmith.config.section import PluginConfig, Section

KeyPath = tuple[str | int, ...]
Files = tuple[Path, ...]


def dotted(path: KeyPath) -> str:
    """`("data", 0, "path")` as it is written on the command line."""
    return ".".join(map(str, path))


def child(tree: Any, part: str | int) -> Any:
    """One step down a tree of plain values; None when there is nothing."""
    if isinstance(tree, dict):
        return tree.get(part)
    if isinstance(tree, list | tuple) and isinstance(part, int) and 0 <= part < len(tree):
        return tree[part]
    return None


def section_at(path: KeyPath, tree: Any, files: Files = ()) -> type[Section] | None:
    """The class of the table at `path` of `tree`, or None where no table belongs."""
    hint: Any = RunConfig
    for part in path:
        if isinstance(part, int):
            hint, tree = item_hint(hint), child(tree, part)
            continue
        section = as_section(hint, tree, files)
        field = section.model_fields.get(part) if section else None
        if field is None:
            return None
        hint, tree = field_hint(field), _value(tree, part, field)
    return as_section(hint, tree, files)


def field_at(path: KeyPath, tree: Any, files: Files = ()) -> FieldInfo | None:
    """The option at `path`, or None."""
    names = [index for index, part in enumerate(path) if isinstance(part, str)]
    if not names:
        return None
    section = section_at(path[: names[-1]], tree, files)
    return section.model_fields.get(str(path[names[-1]])) if section else None


def leaves(tree: Any, files: Files = ()) -> Iterator[KeyPath]:
    """Every option that a config like `tree` can have; lists of tables are looked into by the items that `tree` has."""
    yield from _leaves(RunConfig, tree, (), files)


def _leaves(hint: Any, tree: Any, path: KeyPath, files: Files) -> Iterator[KeyPath]:
    inner = item_hint(hint)
    if inner is not None and as_section(inner, {}, files) is not None:
        for index in range(max(len(tree) if isinstance(tree, list) else 0, 1)):
            yield from _leaves(inner, child(tree, index), (*path, index), files)
        return
    section = as_section(hint, tree, files)
    if section is None:
        yield path
        return
    for name, field in section.model_fields.items():
        yield from _leaves(field_hint(field), _value(tree, name, field), (*path, name), files)


def _value(tree: Any, name: str, field: FieldInfo) -> Any:
    """What is given, or the default of a section that was not (`optim` is a torch optimizer unless said otherwise)."""
    given = child(tree, name)
    return field.default if given is None and isinstance(field.default, dict) else given


def field_hint(field: FieldInfo) -> Any:
    """The type of an option with its metadata."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def item_hint(hint: Any) -> Any:
    """X of `list[X]`, or None."""
    if get_origin(hint) is Annotated:
        return item_hint(get_args(hint)[0])
    return get_args(hint)[0] if get_origin(hint) is list else None


def choice_of(hint: Any) -> Choice | None:
    """The folder behind an option, where it is a plug-in."""
    if get_origin(hint) is Annotated:
        return next((part for part in get_args(hint)[1:] if isinstance(part, Choice)), None)
    if get_origin(hint) in (Union, types.UnionType):
        return next(filter(None, map(choice_of, get_args(hint))), None)
    return None


def as_section(hint: Any, value: Any, files: Files = ()) -> type[Section] | None:
    """The section class of a type; for a plug-in that of `value["type"]`, or the base when that is unknown."""
    choice = choice_of(hint)
    if choice is not None:
        try:
            return choice.config_class(child(value, "type"), files)
        except PydanticCustomError:
            return PluginConfig
    if get_origin(hint) in (Annotated, Union, types.UnionType):
        return next(filter(None, (as_section(part, value, files) for part in get_args(hint))), None)
    return hint if isinstance(hint, type) and issubclass(hint, Section) else None
