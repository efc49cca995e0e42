"""`fluxsmith demo`: see a LoRA learn, in minutes, on any machine, without a download."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from fluxsmith.errors import ConfigError


def command(
    changes: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as train.steps=80.")] = None,
    *,
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path("runs/demo"),
    again: Annotated[bool, typer.Option("--again", help="Delete an earlier demo in this folder first.")] = False,
) -> None:
    """Train the bundled tiny model's LoRA on a shape it has never seen, and show pictures from before and after."""
    from fluxsmith.demo.demo import run_demo
    from fluxsmith.events import Bus
    from fluxsmith.train.sinks.progress import ProgressSink

    if (out / "state").exists():
        if not again:
            raise ConfigError("there is a demo already", where=str(out), fix="add --again to replace it, or give another --out")
        if not (out / "demo.json").exists() and not (out / "pictures" / "zibbo").is_dir():
            raise ConfigError("this folder holds another run", where=str(out), fix="give another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    run_demo(out, Bus(ProgressSink()), typer.echo, changes or ())
