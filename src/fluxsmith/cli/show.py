"""`fluxsmith show run.toml`: every value of a run with its origin."""

import json
from typing import Annotated, Any

import typer

from fluxsmith.cli.arguments import AsJson, Overrides, PluginFiles, RunFile
from fluxsmith.config.dump import to_toml
from fluxsmith.config.load import load_config, values
from fluxsmith.config.schema import as_plain
from fluxsmith.config.sections import child, dotted


def command(
    run: RunFile,
    changes: Overrides = None,
    *,
    plugin: PluginFiles = None,
    changed: Annotated[bool, typer.Option("--changed", help="Leave out defaults.")] = False,
    toml: Annotated[bool, typer.Option("--toml", help="Print the resolved run file instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print each value of a run file and where it comes from: default, preset, file:line:column or command line."""
    loaded = load_config(run, changes or (), plugin_files=plugin or ())
    if toml:
        print(to_toml(loaded.config), end="")
        return
    plain = as_plain(loaded.config)
    rows = {dotted(path): _at(plain, path) for path in values(plain)}
    shown = {key: value for key, value in rows.items() if not changed or loaded.origins[key] != "default"}
    if as_json:
        listing = {key: {"value": value, "origin": loaded.origins[key]} for key, value in shown.items()}
        print(json.dumps({"source": loaded.source, "notes": loaded.notes, "values": listing}, indent=1))
        return
    for note in loaded.notes:
        print(f"note: {note}")
    texts = {key: "-" if value is None else json.dumps(value, ensure_ascii=False) for key, value in shown.items()}
    width, value_width = max(map(len, texts), default=0), min(48, max(map(len, texts.values()), default=0))
    for key, text in texts.items():
        print(f"{key:<{width}}  {text:<{value_width}}  {loaded.origins[key]}")


def _at(tree: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        tree = child(tree, part)
    return tree
