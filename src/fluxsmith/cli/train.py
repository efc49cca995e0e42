"""`fluxsmith train run.toml`: one training run, or the continuation of one."""

from pathlib import Path
from typing import Annotated

import typer

from fluxsmith.cli.arguments import Overrides, PluginFiles, RunFile
from fluxsmith.config.load import load_config


def command(
    run: RunFile,
    changes: Overrides = None,
    *,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the newest complete state in run.dir.")] = False,
    resume_from: Annotated[Path | None, typer.Option("--resume-from", metavar="DIR", help="Continue this state folder.")] = None,
    allow_change: Annotated[
        list[str] | None, typer.Option("--allow-change", metavar="KEY", help="Resume although this key changed; may be repeated.")
    ] = None,
    plugin: PluginFiles = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
) -> None:
    """Train. Example: fluxsmith train run.toml train.steps=500 run.dir=runs/cats."""
    loaded = load_config(run, changes or (), plugin_files=plugin or ())
    for note in loaded.notes:
        typer.echo(f"note: {note}", err=True)
    from fluxsmith.events import Bus
    from fluxsmith.train.run import train
    from fluxsmith.train.sinks.progress import ProgressSink

    progress = ProgressSink()
    try:
        weights = train(loaded.config, resume=resume_from or resume, allow_change=allow_change or (), bus=Bus() if quiet else Bus(progress))
    finally:
        progress.close()  # whatever happened, the terminal is left tidy
    if weights.name:
        typer.echo(f"weights: {weights}")
        typer.echo(f"report: {loaded.config.run.dir / 'report.html'}")
