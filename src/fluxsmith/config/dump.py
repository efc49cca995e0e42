"""A config in other forms: TOML text, the JSON Schema of all configs, and the Markdown reference made from the docstrings.

`python -m fluxsmith.config.dump docs/reference` (`make docs`) writes `config.md` and `schema.json`.
"""

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tomlkit
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fluxsmith.config.choice import config_class, plugin_names
from fluxsmith.config.schema import RunConfig
from fluxsmith.config.section import Section
from fluxsmith.config.sections import as_section, choice_of, field_hint, item_hint

INTRODUCTION = """# Configuration reference

Made by `make docs` from the sources; do not edit. A run file is TOML (or JSON with the same keys); on the command line write
`train.steps=500`, `data.0.path=cats`, `sample.0.prompt="a cat"`, or `train.steps=null` to take a value of the file away.
Values come from the defaults below, the preset of the model's family, the file and the command line, the later winning:
`fluxsmith show run.toml` prints each value with its origin. Paths are relative to the current directory; `~` is your home.
"""


def to_toml(config: Section, *, only_set: bool = False) -> str:
    """TOML text that loads to an equal config; `only_set` leaves out what nobody set."""
    plain = config.model_dump(mode="json", exclude_none=True, exclude_unset=only_set)
    simple = {key: value for key, value in plain.items() if not _is_table(value)}
    tables = {key: value for key, value in plain.items() if _is_table(value)}
    return tomlkit.dumps({**simple, **tables}).lstrip("\n")


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def json_schema() -> dict[str, Any]:
    """JSON Schema of a run file, with every plug-in of this installation."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}


def reference_markdown() -> str:
    """The reference: a table of options for every section and every plug-in."""
    parts = [INTRODUCTION]
    parts += [
        "## The file\n",
        *_table({name: field for name, field in RunConfig.model_fields.items() if _sections_of(name, field) == [] or _is_plugin(field)}),
    ]
    for name, field in RunConfig.model_fields.items():
        for title, section in _sections_of(name, field):
            parts.append(f"\n## {title}\n")
            parts += [f"{inspect.cleandoc(section.__doc__ or field.description or '')}\n", *_table(_options(section))]
    return "\n".join(parts) + "\n"


def _is_plugin(field: FieldInfo) -> bool:
    hint = field_hint(field)
    return choice_of(item_hint(hint) or hint) is not None


def _sections_of(name: str, field: FieldInfo) -> list[tuple[str, type[Section]]]:
    """The tables that an option of the run leads to, each with its title."""
    hint = field_hint(field)
    item = item_hint(hint)
    key = f"[[{name}]]" if item is not None else f"[{name}]"
    choice = choice_of(item or hint)
    if choice is not None:
        return [(f'`{key}` type = "{plugin}"', config_class(choice.package, plugin)) for plugin in plugin_names(choice.package)]
    section = as_section(item or hint, {})
    return [(f"`{key}`", section)] if section else []


def _options(section: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    """Options by dotted name; sections inside are laid out flat."""
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        inner = as_section(field_hint(field), {})
        if inner is not None and choice_of(field_hint(field)) is None:
            found |= _options(inner, f"{prefix}{name}.")
        elif (prefix, name) != ("", "type"):
            found[prefix + name] = field
    return found


def _table(fields: dict[str, FieldInfo]) -> Iterator[str]:
    if not fields:
        yield "No options."
        return
    yield "| Option | Type | Default | Meaning |"
    yield "|---|---|---|---|"
    for name, field in fields.items():
        cells = (f"`{name}`", type_text(field_hint(field)), _default_text(field), " ".join((field.description or "").split()))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def type_text(hint: Any) -> str:
    """A type in the words of a run file: `number >= 0`, `one of "disk", "off"`, `list of text`."""
    choice = choice_of(item_hint(hint) or hint)
    if choice is not None:
        names = ", ".join(f'"{name}"' for name in plugin_names(choice.package)) or "(none is installed)"
        return f"{'tables' if item_hint(hint) else 'table'}, `type` one of {names}"
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = [text for part in inner[1:] for text in _bounds(part)]
        return " ".join([type_text(inner[0]), " and ".join(bounds)]).strip()
    if origin is Literal:
        return ("one of " if len(inner) > 1 else "") + ", ".join(json.dumps(value) for value in inner)
    if origin in (list, tuple):
        return _sequence_text(origin, inner)
    if origin is dict:
        return f"table of {type_text(inner[1])}"
    if inner:  # a union
        return " or ".join(dict.fromkeys(type_text(part) for part in inner if part is not type(None)))
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path"}
    return names.get(hint) or getattr(hint, "__name__", str(hint))


def _sequence_text(origin: Any, inner: tuple[Any, ...]) -> str:
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"[{', '.join(type_text(part) for part in inner)}]"
    return f"list of {type_text(inner[0])}"


def _bounds(part: Any) -> Iterator[str]:
    for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
        bound = getattr(part, name, None)
        if bound is not None:
            yield f"{sign} {bound}"
    for inner in getattr(part, "metadata", ()):
        yield from _bounds(inner)


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is None or default is PydanticUndefined:
        return ""
    plain = default.model_dump(mode="json") if isinstance(default, Section) else default
    text = json.dumps(list(plain) if isinstance(plain, tuple) else plain, default=str)
    return f"`{text}`"


def main(folder: Path) -> None:
    """Writes both references into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.md").write_text(reference_markdown(), encoding="utf-8")
    (folder / "schema.json").write_text(json.dumps(json_schema(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
