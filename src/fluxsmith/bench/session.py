"""All chosen scenarios, each in a process of its own: references first, then rows; the result as a dict and as a table.

A scenario that the device cannot do is a row with the reason, and so is one that fails; the others are measured all the same.
"""

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fluxsmith
from fluxsmith.bench.child import answer
from fluxsmith.bench.job import Order, as_json, references
from fluxsmith.bench.meter import device_facts
from fluxsmith.bench.scenarios import Scenario

LIBRARIES = ("torch", "triton", "bitsandbytes", "torchao", "diffusers", "peft")
Answer = dict[str, Any]


@dataclass(frozen=True)
class Wish:
    """What the command was asked for."""

    scenarios: tuple[Scenario, ...]
    size: str
    device: str
    repeats: int = 20
    loss_steps: int = 50
    card: float = 0.0
    peak_tflops: float = 0.0
    checked: bool = True
    """Measure references too."""
    apart: bool = True
    """Each scenario in a process of its own."""
    against: Path | None = None
    """A script that measures the same scenario with other software."""
    hours: float = 1.0
    """Longest time of one scenario."""


def run(wish: Wish, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure everything."""
    rows: list[Answer] = []
    with tempfile.TemporaryDirectory(prefix="fluxsmith-bench-") as folder:
        known: dict[str, str] = {}
        for number, scenario in enumerate(wish.scenarios):
            losses = wish.loss_steps if wish.checked else 0
            order = Order(scenario.name, wish.size, wish.device, folder, wish.repeats, losses, wish.card, wish.peak_tflops)
            say(f"{number + 1}/{len(wish.scenarios)} {scenario.name}")
            for reference in references(order) if wish.checked else []:
                if reference.key not in known:
                    made = _measured(reference, wish)
                    known[reference.key] = made.get("failed") or made.get("skipped") or ""
            made = _measured(order, wish)
            if "row" in made and wish.checked:
                known.setdefault(order.key, "")
            rows.append(_row(scenario, made, [known.get(one.key, "") for one in references(order)]))
            if wish.against is not None and scenario.kind == "train":
                rows[-1]["against"] = _against(wish.against, order, wish)
    return {**facts(wish), "rows": rows}


def _row(scenario: Scenario, made: Answer, troubles: Sequence[str]) -> Answer:
    row = made.get("row") or {"name": scenario.name, "kind": scenario.kind, "about": scenario.about, **made}
    trouble = next((text for text in troubles if text), "")
    for check in row.get("checks", {}).values():
        if check["ok"] is None and "could not be measured" in check["why"]:
            check["why"] += f": {trouble}"
    return row


def _measured(order: Order, wish: Wish) -> Answer:
    if not wish.apart:
        return answer(order)
    ask, told = Path(order.folder) / "order.json", Path(order.folder) / "answer.json"
    ask.write_text(as_json(order), encoding="utf-8")
    told.unlink(missing_ok=True)
    return _asked([sys.executable, "-m", "fluxsmith.bench.child", str(ask), str(told)], told, wish.hours * 3600)


def _against(script: Path, order: Order, wish: Wish) -> Answer:
    """The same scenario, measured by another script in this very session."""
    ask, told = Path(order.folder) / "order.json", Path(order.folder) / "answer.json"
    ask.write_text(as_json(replace(order, reference="")), encoding="utf-8")
    told.unlink(missing_ok=True)
    return _asked([sys.executable, str(script), str(ask), str(told)], told, wish.hours * 3600)


def _asked(words: list[str], told: Path, seconds: float) -> Answer:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)  # noqa: S603  our own interpreter and files
    except subprocess.TimeoutExpired:
        return {"failed": f"not finished after {seconds:g} s"}
    if told.is_file():
        return json.loads(told.read_text(encoding="utf-8"))
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    return {"failed": f"the process ended with {done.returncode}: {last[0]}"}


def facts(wish: Wish) -> dict[str, Any]:
    """What the figures belong to: versions, commit, device, date, command."""
    versions = {"fluxsmith": fluxsmith.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = ""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["fluxsmith", *sys.argv[1:]]),
        "commit": commit(),
        "versions": versions,
        "device": device_facts(torch.device(wish.device)),
        "platform": platform.platform(),
        "size": wish.size,
        "repeats": wish.repeats,
        "card_gib": wish.card or None,
    }


def commit() -> str:
    """Of the source tree this runs from, with `+` where it has changes; empty for an installed package."""
    folder = Path(__file__).resolve().parents[3]
    if not (folder / ".git").exists():
        return ""
    words = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603  fixed words
    except (OSError, subprocess.CalledProcessError):
        return ""


def table(result: Mapping[str, Any]) -> str:
    """The rows in Markdown."""
    device, versions = result["device"], result["versions"]
    head = f"{device['name']}, model {result['size']}, torch {versions['torch']}, commit {result['commit'][:12] or '?'}, {result['date']}"
    names = ["scenario", "s/step", "p90", "pictures/s", "MFU", "peak GiB", "checks"]
    names += ["against"] if any("against" in row for row in result["rows"]) else []
    lines = [head, "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in result["rows"]:
        problem = row.get("skipped") or row.get("failed")
        if problem:
            cells = [row["name"], f"{'skipped' if 'skipped' in row else 'failed'}: {str(problem).replace('|', '/')}"]
        else:
            cells = [row["name"], _seconds(row["median_s"]), _seconds(row["p90_s"]), _number(row.get("images_per_s"))]
            cells += [_number(row.get("mfu")), _peak(row), _verdict(row["checks"])]
        cells += [""] * (len(names) - len(cells))
        if "against" in row:
            cells[-1] = _rival(row)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rival(row: Mapping[str, Any]) -> str:
    """What the other software needed, and how many times as long as this."""
    other = row["against"]
    if "median_s" not in other:
        return str(other.get("skipped") or other.get("failed"))
    ratio = f", {other['median_s'] / row['median_s']:.2f} times as long" if "median_s" in row else ""
    return f"{_seconds(other['median_s'])} ({other['name']}{ratio})"


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value >= 0.1 else f"{value * 1e3:.3g} ms"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _peak(row: Mapping[str, Any]) -> str:
    found = row.get("memory_bytes", {}).get("allocated") or row.get("counts", {}).get("allocated")
    return "" if found is None else f"{found / 2**30:.3g}"


def _verdict(checks: Mapping[str, Any]) -> str:
    bad = [f"{name} {check['value']:.2g} (limit {check['limit']:g})" for name, check in checks.items() if check["ok"] is False]
    unknown = [name for name, check in checks.items() if check["ok"] is None]
    parts = ["FAILED: " + ", ".join(bad)] if bad else []
    if unknown:
        parts.append(f"unchecked: {', '.join(unknown)}")
    return "; ".join(parts) or ("ok" if checks else "")
