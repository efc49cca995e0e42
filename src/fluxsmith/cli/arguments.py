"""Arguments that several verbs share, so that they look the same everywhere."""

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from fluxsmith.errors import ConfigError

RunFile = Annotated[Path, typer.Argument(metavar="RUN.TOML", help="The run file (TOML or JSON).", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as train.steps=500.", show_default=False)
]
PluginFiles = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="FILE|CLASS", help="A plug-in file of your own, or a class that the run may import; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Target = Annotated[Path, typer.Option("--out", "-o", help="File to write.")]
WrittenDtype = Literal["keep", "fp32", "fp16", "bf16", "fp8", "fp8_e5m2"]
AdapterFormat = Literal[
    "kohya", "peft", "ai_toolkit", "comfy", "onetrainer", "bfl_peft", "lycoris", "diffsynth", "xlabs", "bfl_control"
]  # fmt: skip
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write over a file that is there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")]
Device = Annotated[Literal["cpu", "cuda"], typer.Option("--device", help="Where to compute.")]


def weighted(text: str, option: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT. Raises ConfigError for a weight that is no number to multiply with."""
    path, _, number = text.rpartition(":")
    try:
        weight = float(number) if path else 1.0
    except ValueError:
        return text, 1.0
    if not math.isfinite(weight):
        raise ConfigError(f"{option} {text}", why="the weight is not a number", fix=f"write {path}:1.0")
    return path or text, weight
