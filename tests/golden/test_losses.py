"""Straight-run anchors: 20 losses of five kinds of training, for one thread and two. `make golden` renews them, with the reason in
the commit. To the bit on the kind of machine that made them, close everywhere else."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

KINDS: dict[str, dict[str, Any]] = {
    "full": {"adapter": None, "train.ema": {"decay": 0.9}, "schedule": {"name": "cosine", "warmup": 3}, "train.accumulation": 2},
    "lora-bf16": {"adapter.dropout": 0.2, "train.precision": "bf16", "noise.sampling": "sigmoid", "noise.guidance": [1.0, 4.0]},
    "muon-huber": {"adapter": None, "optim": {"type": "muon", "lr": 1e-3}, "objective": {"type": "flow", "loss": "huber"}},
    "text-encoders": {"adapter.text_encoders": ["clip_l", "t5xxl"], "cache.text": "off", "data.0.captions": {"dropout": 0.3}},
    "autoencoder": {
        "adapter": None,
        "train.components": ["ae"],
        "objective": {"type": "reconstruction"},
        "cache.latents": "off",
        "data.0.flip": True,
        "data.0.color_jitter": 0.3,
    },
}
CLOSE = {"lora-bf16": 0.02}  # relative, on another machine; 1e-3 for the others
SOURCE = Path(__file__).resolve().parents[2] / "src"
SCRIPT = """
import sys
from pathlib import Path
from fluxsmith.config.load import load_config
from fluxsmith.events import Bus
from fluxsmith.train.run import train
for path in sys.argv[1:]:
    train(load_config(Path(path)).config, bus=Bus())
"""
Golden = Callable[[str, Any], dict[str, Any]]


@pytest.fixture(scope="module", params=[1, 2])
def anchors(
    request: pytest.FixtureRequest, tiny_run: Any, golden_section: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, dict[str, list[str]]]:
    """Number of threads, and the losses of every kind. In a process of its own, whose threads sleep while they wait: on a busy
    machine two that spin are twenty times slower."""
    folder = tmp_path_factory.mktemp("anchors")
    for kind, changes in KINDS.items():
        own = {"model": golden_section, "cache.dir": str(folder / "cache" / kind), "train.steps": 20, "train.threads": request.param}
        (folder / f"{kind}.json").write_text(json.dumps(tiny_run(folder / kind, {**own, **changes})))
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(request.param)}
    words = [sys.executable, "-c", SCRIPT, *(str(folder / f"{kind}.json") for kind in KINDS)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {kind: (folder / kind / "metrics.jsonl").read_text().splitlines() for kind in KINDS}
    return request.param, {kind: [json.loads(line)["loss_hex"] for line in lines] for kind, lines in rows.items()}


@pytest.mark.ledger("FS-05")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_losses(
    anchors: tuple[int, dict[str, list[str]]], golden: Golden, same_machine: Callable[[dict[str, Any]], None], kind: str
) -> None:
    threads, losses = anchors[0], anchors[1][kind]
    assert len(set(losses)) == 20
    stored = golden(f"losses/{kind}-{threads}", losses)
    numbers, expected = ([float.fromhex(text) for text in values] for values in (losses, stored["values"]))
    assert numbers == pytest.approx(expected, rel=CLOSE.get(kind, 1e-3))
    same_machine({"made_by": {**stored["made_by"], "threads": str(torch.get_num_threads())}})  # the file's name has its own number
    assert losses == stored["values"]


def test_every_anchor_has_a_test(update_golden: bool) -> None:
    found = {path.stem for path in (Path(__file__).parent / "losses").glob("*.json")}
    assert update_golden or found == {f"{kind}-{threads}" for kind in KINDS for threads in (1, 2)}
