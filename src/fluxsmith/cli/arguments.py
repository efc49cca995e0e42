"""Arguments that several verbs share, so that they look the same everywhere."""

from pathlib import Path
from typing import Annotated

import typer

RunFile = Annotated[Path, typer.Argument(metavar="RUN.TOML", help="The run file (TOML or JSON).", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as train.steps=500.", show_default=False)
]
PluginFiles = Annotated[list[Path] | None, typer.Option("--plugin", metavar="FILE", help="A plug-in of your own; may be repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
