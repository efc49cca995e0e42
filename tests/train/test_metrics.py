"""One row a step: hex floats that are exact, rows taken back on resume, and a file that somebody shortened."""

import json
import math
from pathlib import Path

from fluxsmith.io.durable import Disk
from fluxsmith.train.metrics import Metrics


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def filled(tmp_path: Path, steps: int = 5) -> tuple[Metrics, list[int]]:
    metrics, sizes = Metrics(tmp_path / "metrics.jsonl", Disk()), [0]
    for step in range(1, steps + 1):
        metrics.add(step, 1 / step, 1e-3, math.pi * step)
        sizes.append(metrics.size)
    return metrics, sizes


def test_rows_are_exact(tmp_path: Path) -> None:
    metrics, _ = filled(tmp_path, 3)
    third = rows(metrics.path)[2]
    assert third["step"] == 3
    assert float.fromhex(str(third["loss_hex"])) == 1 / 3
    assert float.fromhex(str(third["grad_norm_hex"])) == math.pi * 3
    assert metrics.size == metrics.path.stat().st_size


def test_values_that_are_no_json(tmp_path: Path) -> None:
    metrics, _ = filled(tmp_path, 1)
    metrics.add(2, math.nan, 1e-3, math.inf)
    last = json.loads(metrics.path.read_text().splitlines()[-1], parse_constant=lambda name: 1 / 0)
    assert (last["loss"], last["loss_hex"], last["grad_norm"], last["grad_norm_hex"]) == (None, "nan", None, "inf")


def test_rewinding(tmp_path: Path) -> None:
    metrics, sizes = filled(tmp_path)
    assert metrics.rewind(sizes[2]) == 0
    assert [row["step"] for row in rows(metrics.path)] == [1, 2]
    metrics.add(3, 0.5, 1e-3, 1.0)
    assert [row["step"] for row in rows(metrics.path)] == [1, 2, 3]


def test_a_torn_line_goes(tmp_path: Path) -> None:
    _, sizes = filled(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    again = Metrics(path, Disk())
    again.rewind(sizes[4])
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4]


def test_a_file_that_was_shortened_or_removed(tmp_path: Path) -> None:
    """The missing bytes are told, and later rows are counted from what is there."""
    _, sizes = filled(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: sizes[1]])
    again = Metrics(path, Disk())
    assert again.rewind(sizes[4]) == sizes[4] - sizes[1]
    again.add(5, 0.5, 1e-3, 1.0)
    size = again.size
    again.add(6, 0.5, 1e-3, 1.0)
    again.rewind(size)
    assert [row["step"] for row in rows(path)] == [1, 5]
    path.unlink()
    assert Metrics(path, Disk()).rewind(100) == 100


def test_syncing_nothing_is_no_error(tmp_path: Path) -> None:
    Metrics(tmp_path / "metrics.jsonl", Disk()).sync()
    metrics, _ = filled(tmp_path)
    before = metrics.path.read_bytes()
    metrics.sync()
    assert metrics.path.read_bytes() == before
