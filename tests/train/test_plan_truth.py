"""The plan against what a run really holds: the trainer's own step on the CPU, every tensor counted, within five parts of a hundred."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxsmith.bench import training
from fluxsmith.bench.scenarios import LORA, Scenario
from fluxsmith.bench.sizes import SIZES, Size, tiny_params
from fluxsmith.config.load import load_config
from fluxsmith.config.schema import RunConfig
from fluxsmith.memory.live import LiveBytes
from fluxsmith.memory.plan import PROCESS, predict
from fluxsmith.train.planning import planned

SMALL = Size("small", tiny_params(192, 2, 2, 3), smaller=8, ae_widths=(32, 32, 32, 32))
RECOMPUTED: Mapping[str, Any] = {"checkpointing": True}
RUNS: Mapping[str, Mapping[str, Any]] = {
    "kept": {"adapter": LORA},
    "selective": {"adapter": LORA, "memory": {**RECOMPUTED, "checkpointing_plan": {"selective": 3, "keep": 1}}},
    "streamed": {"adapter": LORA, "memory": {**RECOMPUTED, "stream_blocks": 57}},
    "lookahead": {"adapter": LORA, "memory": {**RECOMPUTED, "modulation": "lookahead"}},
    "int8": {"adapter": LORA, "quant": {"type": "int8", "exclude": ["single_blocks"]}, "memory": RECOMPUTED},
    "dora": {"adapter": {**LORA, "type": "dora"}},
    "fused": {"memory": {**RECOMPUTED, "fused_update": "block"}},
    "controlnet": {"control": [{"type": "controlnet", "train": True, "layout": "pixels"}], "memory": RECOMPUTED},
}


def held(scenario: Scenario) -> tuple[int, RunConfig]:
    """Peak bytes of the second step, weights and states included, and the run's config."""
    with tempfile.TemporaryDirectory() as folder, LiveBytes() as live:
        made = training.ready(scenario, SMALL, Path(folder), torch.device("cpu"))
        made.trainer.go()
        live.mark()
        made.trainer.go()
        return live.peak["cpu"], made.parts.config


@pytest.mark.ledger("FS-03")
@pytest.mark.parametrize("name", RUNS)
def test_a_step_holds_what_the_plan_says(name: str) -> None:
    scenario = Scenario(name, "train", name, side=1024, text=512, run=RUNS[name])
    measured, config = held(scenario)
    config = config.model_copy(update={"model": config.model.model_copy(update={"t5_length": SMALL.text(512)})})
    job = planned(config, on_card=False, shapes=SMALL.shapes, rehearses=True).job
    predicted = next(phase.host for phase in predict(job) if phase.name == "train") - PROCESS
    assert predicted == pytest.approx(measured, rel=0.05)


BASE: dict[str, Any] = {"model": {"type": "flux1"}, "train": {"steps": 1}, "data": [{"type": "folder", "path": "x"}], "run": {"dir": "y"}}


@pytest.mark.ledger("FS-03")
@pytest.mark.parametrize(
    "adapter", [{"type": "lokr", "rank": 8}, {"type": "loha", "rank": 4}, {"type": "full"}, {"type": "dora", "rank": 4}]
)
def test_adapters_are_counted_by_their_own_shapes(adapter: dict[str, Any]) -> None:
    scenario = Scenario("x", "train", "x", run={"adapter": {"targets": "blocks", **adapter}})
    with tempfile.TemporaryDirectory() as folder:
        made = training.ready(scenario, SIZES["tiny"], Path(folder), torch.device("cpu"))
    job = planned(made.parts.config, on_card=False, shapes=SIZES["tiny"].shapes).job
    assert job.trained == sum(param.numel() for param in made.parts.trained.params.values())


@pytest.mark.ledger("FS-03")
def test_text_encoders_controls_and_exceptions_are_counted() -> None:
    shapes = SIZES["tiny"].shapes
    plain = load_config({**BASE, "adapter": {"type": "lora", "rank": 4, "targets": "blocks"}}).config
    clip = load_config({**BASE, "adapter": {"type": "lora", "rank": 4, "targets": "blocks", "text_encoders": ["clip_l"]}}).config
    more = planned(clip, on_card=True, shapes=shapes).job
    per_layer = 4 * (4 * (768 + 768) + 2 * (768 + 3072))
    assert more.trained - planned(plain, on_card=True, shapes=shapes).job.trained == 12 * per_layer
    assert more.live_text
    assert more.live_activations > 0

    data = [{"type": "folder", "path": "x", "condition_dir": "y"}]
    frozen = load_config({**BASE, "data": data, "adapter": {"type": "lora", "rank": 4}, "control": [{"type": "controlnet"}]}).config
    assert planned(frozen, on_card=True, shapes=shapes).job.control_weights > 0
    trained = load_config({**BASE, "data": data, "control": [{"type": "controlnet", "train": True}]}).config
    job = planned(trained, on_card=True, shapes=shapes).job
    assert job.control_blocks == (2, 0)
    assert job.trained > 0
    assert job.encodes_condition

    adapter = {"type": "lora", "rank": 4}
    sizes = [
        planned(load_config({**BASE, "adapter": adapter, "quant": {"type": "int8", "exclude": list(left)}}).config, on_card=True).job.stored
        for left in ((), (r"double_blocks\.0\.",))
    ]
    assert sizes[0] is not None
    assert sizes[1] is not None
    assert sizes[1].blocks[0] == pytest.approx(2 * sizes[0].blocks[0], rel=0.01)
    assert sizes[1].blocks[1:] == sizes[0].blocks[1:]
