"""events.jsonl: every event of a run, one JSON object a line; the truth that other views are made from."""

import json
from pathlib import Path

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
        self.disk.append_text(self.path, json.dumps(event.as_record(), ensure_ascii=False) + "\n")


def _is_torn(path: Path) -> bool:
    """True if the last line has no end."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() != b"\n"


def read_events(path: Path) -> list[dict[str, object]]:
    """All events of a file; a torn last line is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
