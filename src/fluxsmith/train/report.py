"""The run as one self-contained HTML file: config, loss, learning rate, samples over steps, before and after, timings, memory.

Made from events.jsonl alone, so `write_report(folder)` works on any run folder, running, finished or failed.
"""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxsmith.io.durable import Disk, readable_size
from fluxsmith.train.sinks.jsonl import read_events

WIDTH, HEIGHT, PAD = 720, 200, 44
MOST_POINTS = 1200  # of a curve; longer runs are thinned
MOST_COLUMNS = 8  # sample steps shown

STYLE = """
:root { color-scheme: light dark; --line: #8884; --ink: #2a6fdb; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
.scroll { overflow-x: auto; } img { image-rendering: auto; max-width: 100%; border-radius: 4px; }
.pixel img { image-rendering: pixelated; width: 160px; } svg { max-width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; } .curve { fill: none; stroke: var(--ink); stroke-width: 1.6; }
.thin { stroke-opacity: .35; stroke-width: 1; } .axis { stroke: var(--line); } pre { overflow-x: auto; background: #8881; padding: 1rem; }
.warn { color: #b35900; } .fail { color: #c0392b; font-weight: 600; }
"""


def write_report(run_dir: Path, disk: Disk) -> Path:
    """Write report.html of a run folder; returns its path."""
    path = run_dir / "report.html"
    disk.write_text(path, render(run_dir))
    return path


def render(run_dir: Path) -> str:
    """The page."""
    events = _effective(read_events(run_dir / "events.jsonl"))
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        by_kind.setdefault(event["event"], []).append(event)
    steps = by_kind.get("StepEnded", [])
    name = html.escape(run_dir.name)
    parts = [
        f"<h1>{name}</h1>",
        _summary(by_kind, steps),
        _section("Before and after", _before_after(by_kind.get("SampleReady", []))),
        _section("Loss", _curve([(e["step"], e["loss"]) for e in steps], smooth=True)),
        _section("Validation loss", _curve([(e["step"], e["loss"]) for e in by_kind.get("ValidationEnded", [])])),
        _section("Learning rate", _curve([(e["step"], e["lr"]) for e in steps])),
        _section("Samples over steps", _samples(by_kind.get("SampleReady", []))),
        _section("Weights", _weights(by_kind.get("WeightsSaved", []))),
        _section("Warnings", _warnings(by_kind.get("Warned", []))),
        _section("Configuration", _config(run_dir)),
    ]
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
    head += f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def _effective(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events that count: a resumed run takes back the steps after its state."""
    kept: list[dict[str, Any]] = []
    for event in events:
        if event["event"] == "RunStarted":
            start = event["start_step"]
            kept = [old for old in kept if old["event"] == "RunStarted" or old.get("step", 0) <= start]
        kept.append(event)
    return kept


def _section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>{body}" if body else ""


def _summary(by_kind: dict[str, list[dict[str, Any]]], steps: Sequence[dict[str, Any]]) -> str:
    rows: list[tuple[str, str]] = []
    failed = by_kind.get("RunFailed", [])
    ended = by_kind.get("RunEnded", [])
    if failed and (not ended or failed[-1]["time"] > ended[-1]["time"]):
        rows.append(("result", f'<span class="fail">failed: {html.escape(failed[-1]["message"])}</span>'))
    elif ended:
        rows.append(("result", "stopped on request" if ended[-1]["stopped"] else "complete"))
    if steps:
        seconds = sorted(event["seconds"] for event in steps)
        rows += [
            ("steps", str(steps[-1]["step"])),
            ("last loss", f"{steps[-1]['loss']:.4f}"),
            ("time in steps", f"{sum(seconds):.1f} s"),
            ("seconds a step", f"median {seconds[len(seconds) // 2]:.4f}, p90 {seconds[int(len(seconds) * 0.9)]:.4f}"),
            ("peak memory", readable_size(max(event["peak_bytes"] for event in steps))),
        ]
    samples, states = by_kind.get("SampleReady", []), by_kind.get("CheckpointSaved", [])
    if samples:
        rows.append(("time in samples", f"{sum(event['seconds'] for event in samples):.1f} s for {len(samples)} pictures"))
    if states:
        rows.append(("time in saving", f"{sum(event['seconds'] for event in states):.2f} s for {len(states)} states"))
    facts = by_kind["RunStarted"][-1]["facts"] if "RunStarted" in by_kind else {}
    rows += [(key, html.escape(str(facts[key]))) for key in ("trained", "world_size", "device", "torch") if key in facts]
    return "<table>" + "".join(f"<tr><th>{key}</th><td>{value}</td></tr>" for key, value in rows) + "</table>"


def _curve(points: Sequence[tuple[float, float]], *, smooth: bool = False) -> str:
    points = [(x, y) for x, y in points if y == y and abs(y) != float("inf")]
    if len(points) < 2:
        return ""
    stride = -(-len(points) // MOST_POINTS)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    scale_x, scale_y = (WIDTH - 2 * PAD) / ((right - left) or 1), (HEIGHT - 2 * PAD) / ((high - low) or 1)

    def line(values: Sequence[float], style: str) -> str:
        places = list(zip(xs, values, strict=True))[::stride]
        text = " ".join(f"{PAD + (x - left) * scale_x:.1f},{HEIGHT - PAD - (y - low) * scale_y:.1f}" for x, y in places)
        return f'<polyline class="{style}" points="{text}"/>'

    lines = line(ys, "curve thin") + line(smoothed(ys), "curve") if smooth else line(ys, "curve")
    labels = (
        f'<text x="{PAD - 6}" y="{PAD + 4}" text-anchor="end">{high:.3g}</text>'
        f'<text x="{PAD - 6}" y="{HEIGHT - PAD}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{PAD}" y="{HEIGHT - PAD + 18}">{left:g}</text>'
        f'<text x="{WIDTH - PAD}" y="{HEIGHT - PAD + 18}" text-anchor="end">step {right:g}</text>'
    )
    axis = f'<path class="axis" fill="none" d="M{PAD} {PAD}V{HEIGHT - PAD}H{WIDTH - PAD}"/>'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">{axis}{lines}{labels}</svg>'


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential average over about a fiftieth of the run, corrected for its start."""
    share = min(1.0, 50 / len(values)) if len(values) > 50 else 0.5
    result, average, weight = [], 0.0, 0.0
    for value in values:
        average, weight = average + share * (value - average), weight + share * (1 - weight)
        result.append(average / weight)
    return result


def _picture(path: str) -> str:
    file = Path(path)
    if not file.is_file():
        return "<em>missing</em>"
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{html.escape(file.name)}" src="data:image/png;base64,{data}">'


def _by_sample(samples: Sequence[dict[str, Any]]) -> dict[str, dict[int, str]]:
    """Prompt and file suffix -> step -> path."""
    table: dict[str, dict[int, str]] = {}
    for event in samples:
        suffix = Path(event["path"]).stem.split("_", 1)[-1]
        table.setdefault(f"{event['prompt']}|{suffix}", {})[event["step"]] = event["path"]
    return table


def _before_after(samples: Sequence[dict[str, Any]]) -> str:
    rows = []
    for key, steps in _by_sample(samples).items():
        if len(steps) > 1:
            first, last = min(steps), max(steps)
            cells = f"<td>{_picture(steps[first])}<br>step {first}</td><td>{_picture(steps[last])}<br>step {last}</td>"
            rows.append(f"<tr>{cells}<td>{html.escape(key.rpartition('|')[0])}</td></tr>")
    return f'<div class="scroll pixel"><table>{"".join(rows)}</table></div>' if rows else ""


def _samples(samples: Sequence[dict[str, Any]]) -> str:
    table = _by_sample(samples)
    steps = sorted({event["step"] for event in samples})
    if len(steps) < 3:
        return ""
    stride = -(-len(steps) // MOST_COLUMNS)
    shown = sorted({*steps[::stride], steps[-1]})
    head = "".join(f"<th>step {step}</th>" for step in shown)
    rows = [
        "<tr>" + "".join(f"<td>{_picture(row[step]) if step in row else ''}</td>" for step in shown) + "</tr>" for row in table.values()
    ]
    return f'<div class="scroll pixel"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _weights(events: Sequence[dict[str, Any]]) -> str:
    rows = []
    for event in events:
        verdict = event["verdict"].get("line", "")
        rows.append(f"<tr><td>step {event['step']}</td><td>{html.escape(event['path'])}</td><td>{html.escape(str(verdict))}</td></tr>")
    return f"<table>{''.join(rows)}</table>" if rows else ""


def _warnings(events: Sequence[dict[str, Any]]) -> str:
    lines = dict.fromkeys(event["message"] for event in events)
    return "<ul>" + "".join(f'<li class="warn">{html.escape(line)}</li>' for line in lines) + "</ul>" if lines else ""


def _config(run_dir: Path) -> str:
    path = run_dir / "run.toml"
    return f"<pre>{html.escape(path.read_text(encoding='utf-8'))}</pre>" if path.is_file() else ""
