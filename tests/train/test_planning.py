"""From configs to plans and back: what auto applies, which numbers a config gives, and what is said when memory runs out."""

from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from ran import Go, same

from fluxsmith.config.load import load_config
from fluxsmith.config.schema import RunConfig
from fluxsmith.errors import ConfigError
from fluxsmith.events import Bus, CacheProgress, PhaseStarted, StepEnded, Warned
from fluxsmith.memory.plan import choose
from fluxsmith.train.planning import apply, planned
from fluxsmith.train.run import LastPhase, out_of_memory

BASE: dict[str, Any] = {
    "model": {"type": "flux1", "path": "nowhere.safetensors"},
    "adapter": {"type": "lora", "rank": 16, "targets": "blocks"},
    "train": {"steps": 1},
    "data": [{"type": "folder", "path": "x"}],
    "run": {"dir": "y"},
}


def config(**changes: Any) -> RunConfig:
    return load_config({**BASE, **changes}).config


@pytest.mark.ledger("FS-03")
def test_a_config_in_numbers() -> None:
    job = planned(config(), on_card=True).job
    assert job.trained == 3_502_080 * 16
    assert (job.base, job.quant, job.state_bytes, job.tokens, job.lookahead, job.kept) == ("bf16", "", 8.0, 4608, True, 57)
    everywhere = planned(config(adapter={"type": "lora", "rank": 16, "targets": "all"}), on_card=True).job
    assert everywhere.trained == 4_786_176 * 16
    assert everywhere.lookahead
    assert not planned(config(adapter={"type": "dora", "rank": 16, "targets": "all"}), on_card=True).job.lookahead
    eight = planned(config(optim={"type": "bnb", "name": "adamw8bit"}, quant={"type": "int8", "text_encoders": True}), on_card=True).job
    assert (eight.state_bytes, eight.quant, eight.text) == (2.0, "int8", "int8")
    memory = {"checkpointing": True, "checkpointing_offload": True, "stream_blocks": "all"}
    streamed = planned(config(memory=memory), on_card=True).job
    assert (streamed.kept, streamed.offloaded, streamed.streamed, streamed.by_host) == (0, 57, 57, True)
    full = planned(config(adapter=None, memory={"fused_update": "block"}), on_card=True).job
    assert (full.is_full, full.is_fused, full.trained, full.lookahead, full.base) == (True, True, 0, False, "fp32")
    batches = planned(config(data=[{"type": "folder", "path": "x", "resolution": 512, "batch_size": 4}]), on_card=True).job
    assert (batches.batch, batches.tokens, batches.side) == (4, 1536, 512)


@pytest.mark.ledger("FS-03")
def test_auto_applies_what_the_plan_says() -> None:
    events: list[Any] = []
    made = apply(config(memory={"plan": "auto", "card": "16GB"}), Bus(events.append))
    job = planned(made, on_card=True).job
    expected = choose(planned(config(), on_card=True).job, 16).job
    assert (job.kept, job.selective, job.offloaded, job.streamed) == (
        expected.kept, expected.selective, expected.offloaded, expected.streamed,
    )  # fmt: skip
    assert job.streamed > 0
    assert made.quant is None
    assert made.memory.plan == "off"
    assert f"{expected.streamed} of 57 blocks are streamed" in events[0].message
    assert apply(config(), Bus()) == config()


def test_a_plan_without_a_card_has_nothing_to_do() -> None:
    events: list[Any] = []
    asked = config(memory={"plan": "auto"}, train={"steps": 1, "device": "cpu"})
    assert apply(asked, Bus(events.append)) == asked
    assert "there is no card" in events[0].message


def test_a_planned_run_trains_to_the_same_bits(go: Go) -> None:
    changes = {**tiny_run.LORA, "adapter.targets": "blocks"}
    plain, other = go(changes, "plain"), go({**changes, "memory.plan": "auto", "memory.card": 0.5}, "other")
    assert other.error is None
    assert any("memory plan for 0.5 GiB" in event.message for event in other.of(Warned))
    assert plain.losses == other.losses
    assert same(plain.weights, other.weights)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"plan": "auto", "swap_blocks": 3, "checkpointing": True}, "chooses blocks by itself"),
        ({"card": 12}, "memory.card has no effect"),
        ({"checkpointing": True, "swap_blocks": 3, "stream_blocks": 3}, "exclude each other"),
        ({"checkpointing": True, "offload": {}, "stream_blocks": 3}, "exclude each other"),
        ({"stream_blocks": "all"}, "memory.stream_blocks needs memory.checkpointing"),
        ({"checkpointing_interval": 2}, "memory.checkpointing_interval needs memory.checkpointing"),
        ({"checkpointing": True, "checkpointing_interval": 2, "checkpointing_plan": {"keep": 2}}, "exclude each other"),
        ({"checkpointing": True, "swap_blocks": 3, "checkpointing_offload": True}, "exclude each other"),
    ],
)
def test_contradictions_are_found_in_the_file(memory: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(memory=memory)
    assert message in "\n".join(caught.value.lines())


@pytest.mark.ledger("FS-03")
def test_out_of_memory_names_the_phase_and_three_changes_with_what_they_save() -> None:
    error = out_of_memory(config(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "train")
    text = "\n".join(error.lines())
    assert "out of memory in phase 'train'" in text
    assert "memory.checkpointing = true" in text
    assert text.count("saves about") == 3
    captions = "\n".join(out_of_memory(config(), RuntimeError("full"), "encode captions").lines())
    assert "quant.text_encoders = true" in captions


def test_the_last_phase_is_known() -> None:
    phases = LastPhase()
    seen = []
    for event in (PhaseStarted("load"), CacheProgress("latents", 0, 1), CacheProgress("text", 0, 1), StepEnded(1, 1, 0.1, 0.1, 0.1, 0.1)):
        phases(event)
        seen.append(phases.last)
    assert seen == ["load", "encode pictures", "encode captions", "train"]


def test_a_card_that_fills_up_ends_the_run_with_advice(go: Go, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("fluxsmith.train.objectives.flow.Flow.loss", full)
    ran = go({**tiny_run.LORA})
    assert ran.error is not None
    assert "phase" in "\n".join(ran.error.lines())
    assert ran.error.kind == "out_of_memory" or ran.error.exit_code
