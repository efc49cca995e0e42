"""`fluxsmith data ...`: look at pictures and captions before a run: `fluxsmith data scan cats/ --resolution 768 --html cats.html`."""

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fluxsmith.config.dataset import DatasetConfig
from fluxsmith.config.load import load_config
from fluxsmith.errors import ModelFileError
from fluxsmith.io.durable import Disk

if TYPE_CHECKING:
    from fluxsmith.config.schema import RunConfig
    from fluxsmith.data.checks import DatasetReport, ScanReport, TokenCounts

app = typer.Typer(help="Look at data sets.", no_args_is_help=True)
CANNOT_START = 3  # exit code: a run would refuse to start with this data
LISTED = 40


@app.callback()
def data() -> None:
    """Look at data sets."""


@app.command("scan")
def scan_data(
    source: Annotated[Path, typer.Argument(help="A folder of pictures, or the TOML or JSON file of a run.")],
    resolution: Annotated[list[int] | None, typer.Option(help="Side of the square whose area buckets have; repeatable.")] = None,
    recursive: Annotated[bool, typer.Option("--recursive", help="Also pictures in sub-folders (of a folder).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report as one JSON object.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a page that shows every picture and its crop.")] = None,
) -> None:
    """Check every picture and caption: buckets, crops, lengths, and each problem with its cure. Exit code 3 if a run would not start."""
    is_startable = _scan(source, resolution or [], recursive=recursive, as_json=as_json, html=html)
    if not is_startable:
        raise typer.Exit(CANNOT_START)


def _scan(source: Path, resolutions: list[int], *, recursive: bool, as_json: bool, html: Path | None) -> bool:
    configs, run = _configs(source, resolutions, recursive=recursive)
    sets = _late("fluxsmith.data.scan").scan(configs)
    counts, note = _token_counts(run)
    report: ScanReport = _late("fluxsmith.data.checks").report_on(sets, token_counts=counts, validation=run.validation if run else None)
    notes = (note,) if note else report.notes
    if as_json:
        print(json.dumps(report.as_record() | {"notes": list(notes)}, indent=1))
    else:
        _print(report, notes)
    if html is not None:
        Disk().write_text(html, _late("fluxsmith.data.sheet").sheet(sets, report))
        if not as_json:
            print(f"\nwritten: {html}")
    return report.is_startable


def _late(module: str) -> Any:
    """Modules that import torch are loaded when there is work to do, so that `--help` stays fast."""
    return import_module(module)


def _configs(source: Path, resolutions: list[int], *, recursive: bool) -> tuple[list[DatasetConfig], "RunConfig | None"]:
    """The data sets of a run, or of a folder with the default options; one for each resolution."""
    if source.is_file():
        run = load_config(source).config
        configs: list[Any] = list(run.data)
    else:
        run = None
        configs = [_late("fluxsmith.data.sources.folder").Config(path=source, recursive=recursive)]
    if not resolutions:
        return configs, run
    return [config.model_copy(update={"resolution": side}) for config in configs for side in resolutions], run


def _token_counts(run: "RunConfig | None") -> tuple["TokenCounts | None", str]:
    """The tokenizers of the run's model, or the reason why captions are not measured."""
    if run is None:
        return None, "captions were not measured in tokens: give the file of a run, whose model names the tokenizers"
    loading, files = _late("fluxsmith.models.loading"), _late("fluxsmith.models.files")
    try:
        lazy = loading.LazyModels(files.locate(run.model), run.model, _late("torch").device("cpu"))
        lazy.tokenizers()
    except ModelFileError as error:
        return None, f"captions were not measured in tokens: {error.problems[0]}"
    return lazy.token_counts, ""


def _print(report: "ScanReport", notes: tuple[str, ...]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for dataset in report.datasets:
        console.print(Text(f"\n{dataset.name}  {dataset.path}", "bold"))
        console.print(_buckets(dataset))
        if dataset.tokens:
            console.print(_tokens(dataset))
        console.print(Text(f"captions: {dataset.with_caption} of {dataset.usable} usable pictures have one"))
        for kind, style in (("error", "red"), ("skipped", "red"), ("left out", "yellow"), ("warning", "yellow")):
            findings = dataset.of(kind)
            for finding in findings[:LISTED]:
                console.print(Text.assemble((f"{kind}: ", style), str(finding.problem)))
            if len(findings) > LISTED:
                console.print(Text(f"{kind}: {len(findings) - LISTED} more (all with --json or --html)", style))
        verdict = "a run can start" if dataset.is_startable else "a run would not start"
        console.print(Text(f"{dataset.verdict()}: {verdict}", "green" if dataset.is_startable else "bold red"))
    for note in notes:
        console.print(Text(note))


def _buckets(dataset: "DatasetReport") -> Table:
    table = Table("bucket", box=None, pad_edge=False)
    table.add_column("pictures", justify="right")
    table.add_column("batches an epoch", justify="right")
    for row in dataset.buckets:
        table.add_row(f"{row.bucket.width} x {row.bucket.height}", str(row.pictures), str(row.batches))
    return table


def _tokens(dataset: "DatasetReport") -> Table:
    table = Table("tokens", box=None, pad_edge=False)
    for name in ("limit", "mean", "longest", "cut"):
        table.add_column(name, justify="right")
    for row in dataset.tokens:
        table.add_row(row.encoder, str(row.limit), f"{row.mean:.0f}", str(row.longest), str(len(row.over)))
    return table
