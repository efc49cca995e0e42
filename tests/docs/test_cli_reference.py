"""docs/reference/cli.md is made from the commands' own help: `make docs` renews it."""

import importlib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

from fluxsmith.cli.verbs import Verb, available

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "cli.md"
HEAD = """# Commands

Made by `make docs` from the commands' own help; do not edit.

`fluxsmith COMMAND --help` shows the same. `--debug` anywhere shows tracebacks, `fluxsmith --version` the version.
Changes of a run file are written `key=value` behind it: `train.steps=500`, `data.0.path=cats`, `adapter=null` (takes a value away).
Every command ends with one of the [exit codes](exit-codes.md).
"""


NAMES = {str: "TEXT", int: "N", float: "X", Path: "PATH"}


def command_of(verb: Verb) -> Any:
    module = importlib.import_module(verb.module)
    if verb.member:
        return typer.main.get_command(module.app).commands[verb.member]  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(module.command)
    return typer.main.get_command(app)


def section(verb: Verb) -> str:
    command = command_of(verb)
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    words = [argument_name(param) for param in arguments]
    lines = [
        f"## fluxsmith {verb.name}",
        "",
        " ".join((command.help or verb.help).split()),
        "",
        "    " + " ".join(["fluxsmith", verb.name, *words, "[OPTIONS]"]),
        "",
    ]
    hints = get_type_hints(command.callback)
    rows = [row(param, hints[param.name]) for param in command.params if param.name != "help"]
    return "\n".join([*lines, "| | | Default |", "|---|---|---|", *rows, ""])


def row(param: Any, hint: Any) -> str:
    is_argument = param.param_type_name == "argument"
    name = argument_name(param) if is_argument else ", ".join(param.opts)
    if not is_argument and not param.is_flag:
        name += f" {param.metavar or type_name(hint)}"
    default = (
        "required" if param.required else "" if param.default in (None, False, "", ()) or callable(param.default) else str(param.default)
    )
    cells = (f"`{name}`", " ".join((param.help or "").split()), f"`{default}`" if default and default != "required" else default)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def argument_name(param: Any) -> str:
    name = param.metavar or (param.name.upper() if param.required else f"[{param.name.upper()}]")
    return f"{name}..." if param.nargs == -1 and not name.endswith("...") else name


def type_name(hint: Any) -> str:
    """TEXT, N, X, PATH, or the words to choose from."""
    if get_origin(hint) is Literal:
        return "|".join(get_args(hint))
    inner = [part for part in get_args(hint) if part is not type(None)]
    return type_name(inner[0]) if inner else NAMES[hint]


def page() -> str:
    return "\n".join([HEAD, *[section(verb) for verb in available() if not verb.raw]]).rstrip() + "\n"


def test_the_reference_is_up_to_date(update_golden: bool) -> None:
    if update_golden:
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"


def test_every_option_is_explained() -> None:
    silent = [f"{verb.name} {param.name}" for verb in available() if not verb.raw for param in command_of(verb).params if not param.help]
    assert silent == []
