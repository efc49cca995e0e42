"""`fluxsmith sd-scripts SCRIPT OPTIONS`: an sd-scripts command line, run as it is."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fluxsmith.cli.progress import progress_line
from fluxsmith.dialects.base import Report
from fluxsmith.dialects.sd_scripts import show
from fluxsmith.dialects.sd_scripts.cache_tool import cache_request
from fluxsmith.dialects.sd_scripts.drawing import changed
from fluxsmith.dialects.sd_scripts.drawing import drawing as read_drawing
from fluxsmith.dialects.sd_scripts.lower import lower_draft
from fluxsmith.dialects.sd_scripts.options import read_options, written_config
from fluxsmith.dialects.sd_scripts.scripts import Script, split_command
from fluxsmith.dialects.sd_scripts.tool_requests import tool_request
from fluxsmith.errors import ConfigError

if TYPE_CHECKING:
    from fluxsmith.dialects.base import Draft
    from fluxsmith.events import Event


def command(arguments: Sequence[str]) -> int:
    """Run one command line."""
    words = list(arguments)
    if not words or words[0] in ("--help", "-h"):
        print(show.overview())
        return 0
    script, rest, launcher = split_command(words)
    if "--help" in rest or "-h" in rest:
        print(show.script_help(script))
        return 0
    if not show.is_ready(script):
        raise ConfigError(f"{script.name} is not part of this version yet", fix="fluxsmith sd-scripts --help lists what is")
    draft = read_options(script, rest)
    written = written_config(draft)
    if written is not None:
        print(f"written: {written}")
        return 0
    if launcher:
        text = f"`{launcher}` is not used: for several cards write accelerate launch -m fluxsmith sd-scripts {script.name} ..."
        draft.note("", text)
    RUNNERS[script.kind](script, draft)
    return 0


def _train(script: Script, draft: "Draft") -> None:
    lowered = lower_draft(script, draft)
    from fluxsmith.events import Bus
    from fluxsmith.train.run import train
    from fluxsmith.train.sinks.progress import ProgressSink

    config = lowered.config
    if not lowered.resume:
        folder = fresh(config.run.dir)
        if folder != config.run.dir:
            text = f"{config.run.dir} holds an earlier run, so this one goes to {folder}"
            draft.note("", f"{text}; --resume with one of its state folders would continue it")
        config = config.model_copy(update={"run": config.run.model_copy(update={"dir": folder})})
    progress = ProgressSink()
    try:
        weights = train(config, resume=Path(lowered.resume) if lowered.resume else False, bus=Bus(Preface(lowered.report), progress))
    finally:
        progress.close()
    if weights.name:
        print(f"weights: {weights}")
        print(f"report: {config.run.dir / 'report.html'}")


class Preface:
    """Prints what became of the options before the first event, in the main process only."""

    name = "report"

    def __init__(self, report: Report) -> None:
        self.lines = report.lines()

    def __call__(self, event: "Event") -> None:
        """The first event prints; the others find nothing left."""
        lines, self.lines = self.lines, []
        for line in lines:
            print(line, file=sys.stderr)


def fresh(folder: Path) -> Path:
    """`cats.run`, or `cats-2.run` where that holds a run: sd-scripts starts anew each time and writes over the weights."""
    number = 1
    chosen = folder
    while (chosen / "state").is_dir() and any((chosen / "state").iterdir()):
        number += 1
        chosen = folder.with_name(f"{folder.stem}-{number}{folder.suffix}")
    return chosen


def _draw(script: Script, draft: "Draft") -> None:
    drawing = read_drawing(draft)
    for line in drawing.notes:
        print(line, file=sys.stderr)
    from fluxsmith.dialects.sd_scripts.draw import Artist, lines_until_empty

    artist = Artist(drawing)
    if not drawing.is_interactive:
        _show(*artist.draw(drawing))
        return
    print("a prompt with --w --h --s --d --g --m --n --c; an empty line ends", file=sys.stderr)
    for line in lines_until_empty(sys.stdin):
        try:
            _show(*artist.draw(changed(drawing, line)))
        except ConfigError as error:  # the next line may be better
            print(*error.lines(), sep="\n", file=sys.stderr)


def _show(path: Path, seed: int) -> None:
    print(f"{path}  seed {seed}", flush=True)


def _cache(script: Script, draft: "Draft") -> None:
    request = cache_request(draft)
    for line in request.notes:
        print(line, file=sys.stderr)
    from fluxsmith.dialects.sd_scripts.fill_caches import fill_caches
    from fluxsmith.events import Bus
    from fluxsmith.train.sinks.progress import ProgressSink

    progress = ProgressSink()
    try:
        count = fill_caches(request, Bus(progress))
    finally:
        progress.close()
    print(f"{request.kind} of {count} pictures are in {request.config.cache.dir}")


def _tool(script: Script, draft: "Draft") -> None:
    request = tool_request(draft)
    for line in draft.report.lines():
        print(line, file=sys.stderr)
    from fluxsmith.dialects.sd_scripts.run_tools import run_tool

    with progress_line() as progress:
        lines = list(run_tool(request, progress))
    print(*lines, sep="\n")


RUNNERS = {"train": _train, "draw": _draw, "cache": _cache, "tool": _tool}
