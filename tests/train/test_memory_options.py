"""Memory options in whole runs: the same losses, weights and states as without them; look-ahead falls back and says why."""

from typing import Any

import pytest
import tiny_run
import torch
from ran import Go, same

from fluxsmith.config.load import load_config
from fluxsmith.errors import ConfigError
from fluxsmith.events import Warned
from fluxsmith.memory.modulation import LookAhead
from fluxsmith.train import lookahead, trainer

LORA = {**tiny_run.LORA, "adapter.targets": "blocks", "train.accumulation": 1}
EVERYWHERE = {**LORA, "adapter.targets": "all"}
WAYS = {
    "streamed": {"memory.checkpointing": True, "memory.stream_blocks": "all"},
    "grouped": {"memory.checkpointing": True, "memory.offload": {"blocks_per_group": 2}},
    "offloaded boundaries": {"memory.checkpointing": True, "memory.checkpointing_offload": True, "memory.stream_blocks": 1},
    "selective": {"memory.checkpointing": True, "memory.checkpointing_plan": {"selective": 1, "keep": 1}},
    "interval": {"memory.checkpointing": True, "memory.checkpointing_interval": 2},
    "look-ahead": {"memory.modulation": "lookahead"},
    "everything": {"memory.checkpointing": True, "memory.stream_blocks": "all", "memory.modulation": "lookahead"},
}


def warnings(ran: object) -> list[str]:
    return [event.message for event in ran.of(Warned) if "modulation" in event.message]  # type: ignore[attr-defined]


@pytest.mark.ledger("KS-22")
@pytest.mark.ledger("ST-08")
@pytest.mark.parametrize("way", WAYS)
def test_a_run_ends_in_the_same_bits(go: Go, way: str) -> None:
    plain, other = go(LORA, "plain"), go({**LORA, **WAYS[way]}, "other")
    assert other.error is None
    assert plain.losses == other.losses
    assert same(plain.weights, other.weights)
    assert warnings(other) == []


@pytest.mark.ledger("FS-04")
def test_adapters_on_modulation_train_within_a_millionth(go: Go) -> None:
    plain, other = go(EVERYWHERE, "plain"), go({**EVERYWHERE, "memory.modulation": "lookahead"}, "other")
    assert [float.fromhex(loss) for loss in other.losses] == pytest.approx([float.fromhex(loss) for loss in plain.losses], rel=1e-6)
    assert any("mod" in name for name in other.weights)
    for name, weight in plain.weights.items():
        torch.testing.assert_close(other.weights[name], weight, rtol=1e-4, atol=2e-5)


@pytest.mark.ledger("FS-04")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({**tiny_run.LORA, "adapter.targets": "all", "adapter.type": "dora"}, "needs the weight"),
        ({**tiny_run.LORA, "adapter.targets": "blocks", "cache.text": "off"}, "text is encoded at each step"),
    ],
)
def test_it_falls_back_and_says_why(go: Go, changes: tiny_run.Options, reason: str) -> None:
    changes = {**changes, "train.accumulation": 1}
    plain, other = go(changes, "plain"), go({**changes, "memory.modulation": "lookahead"}, "other")
    assert len(warnings(other)) == 1
    assert reason in warnings(other)[0]
    assert plain.losses == other.losses
    assert same(plain.weights, other.weights)


def test_a_trained_transformer_is_refused_before_the_run() -> None:
    plain = {"model": {"type": "flux1"}, "train": {"steps": 1}, "data": [{"type": "folder", "path": "x"}], "run": {"dir": "y"}}
    with pytest.raises(ConfigError, match="trained cannot be evaluated ahead"):
        load_config({**plain, "memory": {"modulation": "lookahead"}})


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of tables in the order in which they are begun, and a dot for each layer that is evaluated."""
    seen: list[str] = []
    sweeping, evaluate = LookAhead.sweeping, LookAhead._evaluate
    monkeypatch.setattr(LookAhead, "sweeping", lambda self, coming, *, name: (seen.append(name), sweeping(self, coming, name=name))[1])
    monkeypatch.setattr(LookAhead, "_evaluate", lambda self, *rest: (seen.append("."), evaluate(self, *rest))[1])
    return seen


@pytest.mark.ledger("FS-04")
def test_one_sweep_serves_many_steps_and_samples_have_their_own(go: Go, swept: list[str]) -> None:
    sample = [{"prompt": "a red circle", "width": 32, "height": 32, "steps": 2, "first": False}]
    ran = go({**LORA, "memory.modulation": "lookahead", "sample": sample, "train.dry_step": False})
    assert ran.error is None
    assert [name for name in swept if name != "."] == ["steps, one", "request"]


@pytest.mark.ledger("FS-04")
def test_rows_are_refilled_while_steps_run(go: Go, swept: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookahead, "ROWS", 8)
    changes = {**LORA, "train.steps": 9, "train.dry_step": False}
    plain = go(changes, "plain")
    step, begun = trainer.Trainer._gradients, []

    def noted(self: trainer.Trainer, number: int) -> Any:
        swept.append(f"step {number}")
        begun.append(sum(look.missed for look in [self.parts.refill.lookahead]))
        return step(self, number)

    monkeypatch.setattr(trainer.Trainer, "_gradients", noted)
    ran = go({**changes, "memory.modulation": "lookahead"}, "other")
    assert (ran.losses, begun) == (plain.losses, [0] * 9)
    assert same(ran.weights, plain.weights)
    assert [name for name in swept if name.startswith("steps")] == ["steps, one", "steps, other", "steps, one"]
    bursts = "".join("." if name == "." else " " for name in swept).split()
    assert len(bursts[0]) == 3, "the first table at once"
    assert max(len(burst) for burst in bursts[1:]) < 3, "the others bit by bit"


@pytest.mark.ledger("KS-22")
def test_a_run_is_continued_with_other_memory_options_to_the_same_bits(go: Go) -> None:
    changes = {**LORA, "schedule": {"name": "constant"}, "train.ema": None}
    whole = go({**changes, "train.steps": 4}, "whole")
    go({**changes, "train.steps": 2}, "cut")
    cut = go({**changes, **WAYS["streamed"], "train.steps": 4}, "cut", resume=True)
    assert cut.error is None
    assert whole.losses == cut.losses
    assert same(whole.weights, cut.weights)


def test_compile_lengths_without_compile_is_refused() -> None:
    plain = {"model": {"type": "flux1"}, "train": {"steps": 1}, "data": [{"type": "folder", "path": "x"}], "run": {"dir": "y"}}
    with pytest.raises(ConfigError, match="compile_lengths has no effect"):
        load_config({**plain, "adapter": {"type": "lora"}, "memory": {"compile_lengths": "dynamic"}})
    made = load_config({**plain, "adapter": {"type": "lora"}, "memory": {"compile": True, "compile_lengths": "dynamic"}}).config
    assert made.memory.compile_lengths == "dynamic"
