"""The run as one self-contained HTML file: config, loss, learning rate, samples over steps, before and after, timings, memory.

Made from events.jsonl, run.toml and the sample pictures, so `write_report(folder)` works on any run folder: running,
finished, failed or moved. No scripts, nothing from elsewhere.
"""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fluxsmith.io.durable import Disk, readable_size
from fluxsmith.train.curves import STYLE as CURVES
from fluxsmith.train.curves import smoothed, svg_curve
from fluxsmith.train.sinks.jsonl import read_events
from fluxsmith.train.sinks.progress import duration

MOST_COLUMNS = 6  # sample steps shown
LARGEST = 512  # side of an embedded picture; larger ones are embedded smaller, the files stay as they are
SMALL = 200  # sides below are enlarged without smoothing

Record = dict[str, Any]
Kinds = dict[str, list[Record]]

STYLE = """
:root { color-scheme: light dark; --page: #fff; --card: #f4f5f7; --line: #d9dce1; --soft: #667; --ink: #2563eb; --warn: #b45309;
  --fail: #c0261d; --good: #15803d; }
@media (prefers-color-scheme: dark) { :root { --page: #16181d; --card: #20242b; --line: #343a44; --soft: #9aa3b2; --ink: #6ea8fe;
  --warn: #f0b060; --fail: #ff7a70; --good: #6fd08c; } }
body { font: 15px/1.5 system-ui, sans-serif; background: var(--page); margin: 2.5rem auto; max-width: 60rem; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2.4rem 0 .8rem; }
.soft { color: var(--soft); } .warn { color: var(--warn); } .fail { color: var(--fail); } .good { color: var(--good); }
.state { font-weight: 600; margin: 0 0 1.2rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .7rem; margin: 0; }
.cards div { background: var(--card); border-radius: 8px; padding: .6rem .9rem; } .cards dt { color: var(--soft); font-size: .82rem; }
.cards dd { margin: 0; font-size: 1.1rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; } td, th { padding: .25rem 1rem .25rem 0; text-align: left; vertical-align: top; font-weight: normal; }
th { color: var(--soft); white-space: nowrap; } td { overflow-wrap: anywhere; } .scroll { overflow-x: auto; }
figure { margin: 0 0 1.4rem; } figcaption { margin-bottom: .4rem; } .row { display: flex; gap: .8rem; }
.row div { flex: 0 0 auto; font-size: .82rem; color: var(--soft); }
img { display: block; border-radius: 6px; width: 200px; }
.pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); gap: 0 1.4rem; }
.pairs img { width: 13rem; }
.small { image-rendering: pixelated; }
pre { overflow-x: auto; background: var(--card); padding: 1rem; border-radius: 8px; font-size: .85rem; } summary { cursor: pointer; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(run_dir: Path, disk: Disk) -> Path:
    """Write report.html of a run folder; returns its path."""
    path = run_dir / "report.html"
    disk.write_text(path, render(run_dir))
    return path


def render(run_dir: Path) -> str:
    """The page."""
    everything = read_events(run_dir / "events.jsonl")
    kinds = by_kind(effective(everything))
    steps, samples = kinds.get("StepEnded", []), kinds.get("SampleReady", [])
    name = html.escape(run_dir.resolve().name)
    parts = [
        f"<h1>{name}</h1>",
        _state(everything),
        _cards(kinds),
        _section("Before and after", _before_after(samples, run_dir)),
        _section("Loss", svg_curve(_curve(steps, "loss"), smooth=True, title="loss by step")),
        _section("Validation loss", svg_curve(_curve(kinds.get("ValidationEnded", []), "loss"), title="validation loss by step")),
        _section("Learning rate", svg_curve(_curve(steps, "lr"), title="learning rate by step")),
        _section("Samples over steps", _samples(samples, run_dir)),
        _section("Weights", _weights(kinds.get("WeightsSaved", []))),
        _section("Warnings", _warnings(kinds.get("Warned", []))),
        _section("Time and memory", _timings(everything, kinds)),
        _section("Configuration", _config(run_dir)),
    ]
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
    head += f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += f'<meta name="viewport" content="width=device-width"><style>{STYLE}{CURVES}</style></head>'
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def effective(events: Sequence[Record]) -> list[Record]:
    """Events that count: a resumed run takes back the steps after its state."""
    kept: list[Record] = []
    for event in events:
        if event["event"] == "RunStarted":
            kept = [old for old in kept if old.get("step", 0) <= event["start_step"]]
        kept.append(event)
    return kept


def by_kind(events: Sequence[Record]) -> Kinds:
    """Events by their name, in order."""
    kinds: Kinds = {}
    for event in events:
        kinds.setdefault(event["event"], []).append(event)
    return kinds


def _section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>{body}" if body else ""


def _curve(events: Sequence[Record], name: str) -> list[tuple[float, float]]:
    return [(event["step"], event[name]) for event in events if event[name] is not None]


def _state(events: Sequence[Record]) -> str:
    """What became of the run, by the last event that says so."""
    last = next((event for event in reversed(events) if event["event"] in ("RunEnded", "RunFailed", "RunStarted", "StepEnded")), None)
    if last is None:
        return '<p class="state soft">not started</p>'
    if last["event"] == "RunFailed":
        return f'<p class="state fail">failed: {html.escape(last["message"])}</p>'
    if last["event"] == "RunEnded":
        style, text = ("warn", "stopped on request, can be resumed") if last["stopped"] else ("good", "complete")
        return f'<p class="state {style}">{text}</p>'
    return '<p class="state warn">not finished: still running, or killed</p>'


def _cards(kinds: Kinds) -> str:
    steps, started = kinds.get("StepEnded", []), kinds.get("RunStarted", [])
    if not steps:
        return ""
    facts = started[-1]["facts"] if started else {}
    total = f" of {started[-1]['total_steps']}" if started else ""
    losses = [event["loss"] for event in steps if event["loss"] is not None]
    seconds = sorted(event["seconds"] for event in steps)
    cards = {"steps": f"{steps[-1]['step']}{total}"}
    if losses:
        cards["loss, averaged"] = f"{smoothed(losses)[-1]:.4f}"
    cards["time in steps"] = duration(sum(seconds))
    cards["a step, median"] = f"{seconds[len(seconds) // 2]:.3g} s"
    cards["peak memory"] = readable_size(max(event["peak_bytes"] for event in steps))
    if "trained" in facts:
        cards["trained values"] = f"{facts['trained']:,}"
    body = "".join(f"<div><dt>{key}</dt><dd>{html.escape(value)}</dd></div>" for key, value in cards.items())
    return f'<dl class="cards">{body}</dl>'


def _timings(events: Sequence[Record], kinds: Kinds) -> str:
    steps, started = kinds.get("StepEnded", []), kinds.get("RunStarted", [])
    rows: list[tuple[str, str]] = []
    if steps:
        seconds = sorted(event["seconds"] for event in steps)
        late = seconds[min(len(seconds) - 1, int(len(seconds) * 0.9))]
        rows.append(("steps", f"{sum(seconds):.1f} s; one takes {seconds[len(seconds) // 2]:.4f} s, nine of ten up to {late:.4f} s"))
    for title, kind, what in (("samples", "SampleReady", "pictures"), ("states saved", "CheckpointSaved", "states")):
        done = kinds.get(kind, [])
        if done:
            rows.append((title, f"{sum(event['seconds'] for event in done):.2f} s for {len(done)} {what}"))
    if events:
        rows.append(("from first to last event", duration(events[-1]["time"] - events[0]["time"])))
    if steps:
        rows.append(("peak memory", readable_size(max(event["peak_bytes"] for event in steps)) + " (card; of the whole program on a CPU)"))
    facts = started[-1]["facts"] if started else {}
    rows += [(key, html.escape(str(facts[key]))) for key in ("device", "card", "threads", "torch", "world_size") if key in facts]
    return "<table>" + "".join(f"<tr><th>{key}</th><td>{value}</td></tr>" for key, value in rows) + "</table>" if rows else ""


# ---- pictures -------------------------------------------------------------------------------------------------------


def embedded(path: Path) -> str:
    """An <img> that holds the picture; a large one is scaled down and stored as JPEG."""
    try:
        with Image.open(path) as image:
            image.load()
    except OSError:
        return "<em>missing</em>"
    kind, data = "png", path.read_bytes()
    if max(image.size) > LARGEST:
        image.thumbnail((LARGEST, LARGEST))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="JPEG", quality=88)
        kind, data = "jpeg", buffer.getvalue()
    style = ' class="small"' if max(image.size) < SMALL else ""
    return f'<img{style} alt="{html.escape(path.name)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _picture(event: Record, run_dir: Path) -> str:
    path = Path(event["path"])
    return embedded(path if path.is_file() else run_dir / "samples" / path.name)  # the folder may have been moved


def _by_sample(samples: Sequence[Record]) -> dict[tuple[str, str], dict[int, Record]]:
    """Prompt and rest of the file name (prompt number, seed) -> step -> event."""
    table: dict[tuple[str, str], dict[int, Record]] = {}
    for event in samples:
        suffix = Path(event["path"]).stem.partition("_")[2]
        table.setdefault((event["prompt"], suffix), {})[event["step"]] = event
    return table


def _figure(prompt: str, pictures: Sequence[tuple[int, str]]) -> str:
    cells = "".join(f"<div>{picture}step {step}</div>" for step, picture in pictures)
    return f'<figure><figcaption>{html.escape(prompt)}</figcaption><div class="row scroll">{cells}</div></figure>'


def _before_after(samples: Sequence[Record], run_dir: Path) -> str:
    rows = []
    for (prompt, _), steps in _by_sample(samples).items():
        if len(steps) > 1:
            rows.append(_figure(prompt, [(step, _picture(steps[step], run_dir)) for step in (min(steps), max(steps))]))
    return f'<div class="pairs">{"".join(rows)}</div>' if rows else ""


def _samples(samples: Sequence[Record], run_dir: Path) -> str:
    rows = []
    for (prompt, _), steps in _by_sample(samples).items():
        if len(steps) == 2:
            continue  # shown above
        numbers = sorted(steps)
        stride = -(-len(numbers) // MOST_COLUMNS)
        shown = sorted({*numbers[::stride], numbers[-1]})
        rows.append(_figure(prompt, [(step, _picture(steps[step], run_dir)) for step in shown]))
    return "".join(rows)


# ---- tables ---------------------------------------------------------------------------------------------------------


def _weights(events: Sequence[Record]) -> str:
    rows = []
    for event in events:
        verdict = event["verdict"].get("line", "")
        rows.append(f"<tr><th>step {event['step']}</th><td>{html.escape(event['path'])}<br>{html.escape(str(verdict))}</td></tr>")
    return f"<table>{''.join(rows)}</table>" if rows else ""


def _warnings(events: Sequence[Record]) -> str:
    lines = dict.fromkeys(event["message"] for event in events)
    return "<ul>" + "".join(f'<li class="warn">{html.escape(line)}</li>' for line in lines) + "</ul>" if lines else ""


def _config(run_dir: Path) -> str:
    path = run_dir / "run.toml"
    if not path.is_file():
        return ""
    return f"<details open><summary>run.toml</summary><pre>{html.escape(path.read_text(encoding='utf-8'))}</pre></details>"
