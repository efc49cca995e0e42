"""`fluxsmith plan run.toml --card 12GB`: what each phase of a run needs, and settings that fit a card, before any weight is read."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fluxsmith.cli.arguments import AsJson, Overrides, PluginFiles, RunFile
from fluxsmith.config.load import load_config
from fluxsmith.config.memory import MemoryConfig
from fluxsmith.errors import ConfigError

if TYPE_CHECKING:
    from fluxsmith.memory.plan import Job

GIB = 2**30
DOES_NOT_FIT = 3  # exit code


def command(
    run: RunFile,
    changes: Overrides = None,
    *,
    card: Annotated[str, typer.Option("--card", metavar="SIZE", help="Choose settings for a card, such as 12GB.")] = "",
    plugin: PluginFiles = None,
    as_json: AsJson = False,
) -> None:
    """Print device and host memory of each phase, what was chosen and why. Exit code 3 where a phase does not fit the card."""
    config = load_config(run, changes or (), plugin_files=plugin or ()).config
    size = _card(card) or config.memory.card
    from fluxsmith.memory.plan import choose
    from fluxsmith.train.planning import planned, rates, told

    found = planned(config, on_card=True if size else None, rehearses=True)
    choice = choose(found.job, size) if size else None
    job = choice.job if choice else found.job
    lines = [*found.notes, *(told(choice, size) if choice and size else [])]
    answer = _answer(job, lines, size)
    answer["rates"] = {name: {"seconds": one.seconds, "kind": one.kind} for name, one in rates(job).items()}
    if as_json:
        print(json.dumps(answer, indent=1))
    else:
        _show(answer)
    if size and any(phase["device"] > size * GIB for phase in answer["phases"]):
        raise typer.Exit(DOES_NOT_FIT)


def _card(text: str) -> float | None:
    """12GB, 12GiB, 12 -> 12.0."""
    if not text:
        return None
    try:
        return MemoryConfig.model_validate({"card": text}).card
    except ValueError:
        raise ConfigError(f"--card {text} is no size", fix="write for example --card 12GB") from None


def _answer(job: "Job", lines: list[str], card: float | None) -> dict[str, Any]:
    from fluxsmith.memory.plan import cures, predict

    total = len(job.counts.blocks)
    settings = {
        "quant": job.quant or job.base, "modulation": "lookahead" if job.lookahead else "resident", "blocks": total, "keep": job.kept,
        "selective": job.selective, "offloaded": job.offloaded, "boundary": total - job.kept - job.selective - job.offloaded,
        "streamed": job.streamed, "tokens": job.tokens, "batch": job.batch, "trained": job.trained or job.counts.total * job.is_full,
    }  # fmt: skip
    phases = [{"name": p.name, "device": p.device, "host": p.host, "parts": p.parts} for p in predict(job)]
    changes = [{"change": change.text, "saves": change.saves} for change in cures(job)]
    return {"card": card, "settings": settings, "notes": lines, "phases": phases, "changes": changes}


def _show(answer: dict[str, Any]) -> None:
    table = Table(title="Predicted peaks, GiB")
    for name in ("phase", "device", "host", "largest parts of it"):
        table.add_column(name, justify="right" if name in ("device", "host") else "left")
    for phase in answer["phases"]:
        largest = sorted(phase["parts"].items(), key=lambda part: -part[1])[:4]
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in largest if size > GIB / 100)
        table.add_row(phase["name"], f"{phase['device'] / GIB:.2f}", f"{phase['host'] / GIB:.2f}", parts)
    console = Console()
    console.print(table)
    console.print("settings: " + ", ".join(f"{name} {value}" for name, value in answer["settings"].items()), soft_wrap=True)
    speeds = [f"{name} {one['seconds']:.2f} s ({one['kind']})" for name, one in answer["rates"].items()]
    console.print(f"a step at 70 % of the peak: {', '.join(speeds)}", soft_wrap=True)
    for line in answer["notes"]:
        console.print(line, soft_wrap=True)
    for change in answer["changes"][:3]:
        console.print(f"would save {change['saves'] / GIB:.2f}: {change['change']}", soft_wrap=True, markup=False)
