"""events.jsonl: every event of a run, one JSON object a line; the truth that other views are made from."""

import json
import math
from pathlib import Path
from typing import Any

from fluxsmith.events import CacheProgress, Event
from fluxsmith.io.durable import Disk


class JsonlSink:
    """Appends events; cache progress is left out but for its end."""

    name = "events.jsonl"

    def __init__(self, path: Path, disk: Disk) -> None:
        self.path = path
        self.disk = disk
        if _is_torn(path):
            disk.append_text(path, "\n")  # the line that a kill tore must not swallow the next one

    def __call__(self, event: Event) -> None:
        """Write one line."""
        if isinstance(event, CacheProgress) and event.done < event.total:
            return
        self.disk.append_text(self.path, json.dumps(_finite(event.as_record()), ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """NaN and infinity become null: JSON has no word for them, and strict readers (browsers) refuse the whole line."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_torn(path: Path) -> bool:
    """True if the last line has no end."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() != b"\n"


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events of a file; a line that a kill tore is left out."""
    events = []
    text = path.read_bytes().decode("utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):  # not splitlines: a prompt may hold U+2028
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events
