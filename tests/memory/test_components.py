"""Parts on the card only while they work: who is moved when, how many blocks wait, and pictures that stay the same."""

import pytest
import torch
from torch import nn

from fluxsmith.config.choice import realise
from fluxsmith.config.load import load_config
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.generate.request import Request
from fluxsmith.memory.components import Components, size_of
from fluxsmith.memory.modulation import LookAhead

CARD = torch.device("meta")  # stands for a device in what is written down


@pytest.mark.ledger("DS-07")
def test_only_what_works_is_on_the_device() -> None:
    moves: list[tuple[str, str]] = []
    parts = {name: nn.Linear(2, 2) for name in ("dit", "t5xxl", "clip_l", "ae")}
    names = {id(part): name for name, part in parts.items()}
    components = Components(parts, CARD, move=lambda module, device: moves.append((names[id(module)], device.type)))
    components.on("t5xxl", "clip_l")
    components.on("dit")
    components.on("dit")
    components.on("ae", "unknown")
    assert moves == [
        ("clip_l", "meta"), ("t5xxl", "meta"),
        ("clip_l", "cpu"), ("t5xxl", "cpu"), ("dit", "meta"),
        ("dit", "cpu"), ("ae", "meta"),
    ]  # fmt: skip


@pytest.mark.ledger("DS-07")
@pytest.mark.ledger("DS-08")
@pytest.mark.parametrize("limit", [0.0, 100.0])
def test_pictures_are_the_same_within_any_limit(tiny_section: dict[str, str], limit: float) -> None:
    request = Request("a red circle", width=32, height=32, steps=2, seed=1, cfg=2.0)
    plain = Pipeline.load(tiny_section, device="cpu").generate(request)
    limited = Pipeline.load(tiny_section, device="cpu", vram_limit=limit)
    assert limited.generate(request).image.tobytes() == plain.image.tobytes()
    dit = limited.models.dit
    assert dit is not None
    assert isinstance(dit.run_modulation, LookAhead)
    assert (dit.run_modulation.sweeps, dit.run_modulation.missed) == (1, 0), "all steps and prompts in one sweep"
    resident = [block for block in dit.blocks if size_of(block)]
    assert len(resident) == (0 if limit == 0 else len(dit.blocks))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_of_any_kind_within_a_limit(tiny_section: dict[str, str], kind: str) -> None:
    section = {"type": kind, "rank": 2, "targets": "all"}
    plain = {"model": tiny_section, "train": {"steps": 1}, "data": [{"type": "folder", "path": "x"}], "run": {"dir": "y"}}
    request = Request("a red circle", width=32, height=32, steps=2, seed=1)
    pictures = []
    for limit in (None, 0.0):
        pipeline = Pipeline.load(tiny_section, device="cpu", vram_limit=limit)
        assert pipeline.models.dit is not None
        adapters = realise(load_config({**plain, "adapter": section}).config.adapter).build({"dit": pipeline.models.dit}, seed=0)
        for param in adapters.params.values():
            torch.nn.init.normal_(param, mean=0.5 if param.dim() == 1 else 0.0, std=0.1, generator=torch.Generator().manual_seed(3))
        pictures.append(pipeline.generate(request).image.tobytes())
    assert pictures[0] == pictures[1]
