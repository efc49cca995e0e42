"""What the steps compute: accumulation, clipping, precision, recomputing; what leaves no trace; and losses that are not finite."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from ran import Go, furthest, same

from fluxsmith.errors import NumericError
from fluxsmith.events import Event, PhaseStarted, RunFailed, SampleReady, StepEnded, ValidationEnded
from fluxsmith.train import trainer
from fluxsmith.train.objectives.flow import Flow
from fluxsmith.train.step import Loss

LORA = {**tiny_run.LORA, "adapter.targets": "attention"}
SAMPLES = [{"prompt": "a red circle", "every": 2, "width": 32, "height": 32, "steps": 2, "count": 2}]


@pytest.mark.ledger("ST-29")
@pytest.mark.ledger("KS-12")
def test_accumulation_equals_a_bigger_batch(go: Go, tmp_path: Path) -> None:
    """One picture used twelve times: whichever way the uses are cut into batches, the draws belong to the uses."""
    pictures = tiny_run.write_pictures(tmp_path / "one", 1)
    optim = {"type": "torch", "name": "sgd", "lr": 0.1}
    base = {
        "train.steps": 1,
        "train.ema": None,
        "train.max_grad_norm": 0,
        "optim": optim,
        "data.0.path": str(pictures),
        "data.0.repeats": 12,
    }
    whole = go({**base, "data.0.batch_size": 12, "train.accumulation": 1}, "whole")
    for batch, accumulation in ((1, 12), (4, 3)):
        parts = go({**base, "data.0.batch_size": batch, "train.accumulation": accumulation}, f"parts{batch}")
        assert furthest(whole.weights, parts.weights) < 1e-6
        assert float.fromhex(whole.losses[0]) == pytest.approx(float.fromhex(parts.losses[0]), rel=1e-6)
        assert whole.rows[0]["grad_norm"] == pytest.approx(parts.rows[0]["grad_norm"], rel=1e-5)
    fewer = go({**base, "data.0.batch_size": 1, "train.accumulation": 11}, "fewer")
    assert furthest(whole.weights, fewer.weights) > 1e-5


@pytest.mark.ledger("ST-29")
def test_clipping(go: Go) -> None:
    base = {"train.steps": 1, "optim": {"type": "torch", "name": "sgd", "lr": 1.0, "weight_decay": 0.0}, "schedule.name": "constant"}
    start = go({**base, "optim.lr": 1e-30}, "start").weights
    moved = {}
    for name, limit in (("off", 0), ("far", 1e6), ("near", 0.01)):
        ran = go({**base, "train.max_grad_norm": limit}, name)
        step = torch.cat([(ran.weights[key] - start[key]).double().flatten() for key in start])
        moved[name] = (float(step.norm()), ran.rows[0]["grad_norm"])
    assert moved["off"] == moved["far"]
    assert moved["off"][0] == pytest.approx(moved["off"][1], rel=1e-4)
    assert moved["near"][0] == pytest.approx(0.01, rel=1e-3)
    assert moved["near"][1] == moved["off"][1], "the norm before clipping is what is logged"


@pytest.mark.ledger("KS-14")
@pytest.mark.parametrize("changes", [{}, {**LORA, "adapter.dropout": 0.3, "adapter.module_dropout": 0.2}], ids=["full", "lora"])
def test_recomputing_changes_no_bit(go: Go, changes: tiny_run.Options) -> None:
    plain, recomputed = go(changes, "plain"), go({**changes, "memory.checkpointing": True}, "recomputed")
    assert plain.losses == recomputed.losses
    assert same(plain.weights, recomputed.weights)


@pytest.mark.ledger("KS-13")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_is_close_and_keeps_fp32_weights(go: Go, precision: str) -> None:
    plain, mixed = go({}, "plain"), go({"train.precision": precision}, precision)
    assert mixed.error is None
    assert plain.losses != mixed.losses
    for one, other in zip(plain.losses, mixed.losses, strict=True):
        assert float.fromhex(one) == pytest.approx(float.fromhex(other), rel=0.05)
    assert all(value.dtype == torch.float32 for value in mixed.weights.values())
    assert furthest(plain.weights, mixed.weights) < 0.02


@pytest.mark.ledger("KS-13")
@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_in_16_bits(go: Go, changes: tiny_run.Options, dtype: str) -> None:
    ran = go({**changes, "train.weights_dtype": dtype, "optim": {"type": "adamw_bf16", "lr": 1e-3}}, "run")
    assert ran.error is None
    assert {value.dtype for value in ran.weights.values()} == {{"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]}
    assert all(value.dtype == torch.float32 for value in ran.tensors(4, "ema").values())
    losses = [float.fromhex(loss) for loss in go(changes, "plain").losses]
    assert [float.fromhex(loss) for loss in ran.losses] == pytest.approx(losses, rel=0.1)


@pytest.mark.ledger("KS-13")
def test_frozen_weights_in_16_bits(go: Go) -> None:
    plain, ran = go(LORA, "plain"), go({**LORA, "train.base_dtype": "bf16"})
    assert ran.error is None
    assert all(value.dtype == torch.float32 for value in ran.weights.values())
    assert float.fromhex(ran.losses[0]) == pytest.approx(float.fromhex(plain.losses[0]), rel=0.05)
    assert ran.losses != plain.losses


# ---- what leaves no trace -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {**LORA, "adapter.dropout": 0.3}], ids=["full", "lora"])
def test_samples_and_the_dry_step_change_no_bit(go: Go, changes: tiny_run.Options) -> None:
    plain = go({**changes, "train.dry_step": False}, "plain")
    dry = go({**changes, "train.dry_step": True}, "dry")
    drawn = go({**changes, "sample": SAMPLES}, "drawn")
    assert len(drawn.of(SampleReady)) == 2 * 3
    assert drawn.warnings == ""
    assert [event.name for event in dry.of(PhaseStarted)].count("dry step") == 1
    for other in (dry, drawn):
        assert other.losses == plain.losses
        assert same(other.weights, plain.weights)
        assert same(other.tensors(4, "ema"), plain.tensors(4, "ema"))
        assert same(other.tensors(4, "optimizer"), plain.tensors(4, "optimizer"))


def test_measuring_held_out_pictures_changes_no_bit(go: Go) -> None:
    """The split itself changes the data, so both runs have it; one measures at every step, one only at the end."""
    often, seldom = (go({"validation": {"every": every, "share": 0.25, "sigmas": [0.3, 0.7]}}, f"run{every}") for every in (1, 4))
    assert len(often.of(ValidationEnded)) == 4
    assert len(seldom.of(ValidationEnded)) == 1
    assert often.losses == seldom.losses
    assert same(often.weights, seldom.weights)
    last, only = often.of(ValidationEnded)[-1], seldom.of(ValidationEnded)[0]
    assert last.by_timestep == only.by_timestep
    assert set(last.by_timestep) == {"0.3", "0.7"}


def test_the_measured_loss_is_of_the_average_and_the_same_pictures(go: Go) -> None:
    """With a rate of nothing, every measurement is the same number."""
    ran = go({"optim.lr": 1e-30, "validation": {"every": 1, "share": 0.25}, "noise.guidance": [1.0, 4.0], **LORA, "adapter.dropout": 0.5})
    values = [event.loss for event in ran.of(ValidationEnded)]
    assert len(values) == 4
    assert max(values) - min(values) < 1e-6
    assert len(set(ran.losses)) == 4


def test_a_sample_that_fails_is_a_warning(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = go({}, "plain")

    def fail(*args: object, **options: object) -> None:
        torch.rand(3)
        raise RuntimeError("no picture today")

    monkeypatch.setattr("fluxsmith.train.validate.Pipeline.generate", fail)
    ran = go({"sample": SAMPLES})
    assert ran.error is None
    assert ran.warnings.count("no picture today") == 6
    assert same(ran.weights, plain.weights)


def test_samples_that_a_kill_left_out_are_drawn_on_resume(go: Go) -> None:
    first = go({"sample": SAMPLES, "checkpoint.every": 2})
    last = sorted((first.folder / "samples").glob("step-000004*"))
    assert len(last) == 2
    for path in last:
        path.unlink()
    again = go({"sample": SAMPLES, "checkpoint.every": 2}, resume=True)
    assert [event.step for event in again.of(SampleReady)] == [4, 4]
    assert go({"sample": SAMPLES, "checkpoint.every": 2}, resume=True).of(SampleReady) == []


# ---- losses that are not finite -----------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], float | None]) -> None:
    """Multiplies the loss of micro-batch n (the dry step is 0) by what `bad(n)` gives."""
    original, count = Flow.loss, [0]

    def loss(self: Flow, *args: Any) -> Loss:
        result, factor = original(self, *args), bad(count[0])
        count[0] += 1
        return result if factor is None else result._replace(total=result.total * factor)

    monkeypatch.setattr(Flow, "loss", loss)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights(go: Go, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    plain = go({"train.steps": 2, "schedule.name": "constant"}, "plain")
    touched: list[dict[str, torch.Tensor]] = []
    original = trainer.Trainer._is_finite

    def watch(self: trainer.Trainer, *args: Any) -> bool:
        try:
            return original(self, *args)
        except NumericError:
            touched.append({name: param.detach().clone() for name, param in self.parts.trained.params.items()})
            raise

    monkeypatch.setattr(trainer.Trainer, "_is_finite", watch)
    poison(monkeypatch, lambda n: factor if n == 6 else None)  # the second micro-batch of step 3
    ran = go({"checkpoint.every": 2, "schedule.name": "constant"})
    assert ran.error is not None
    assert ran.error.exit_code == 5
    text = str(ran.error)
    assert "at step 3" in text
    assert ".png at noise level" in text
    assert "first layer with a non-finite gradient: dit." in text
    assert same(touched[0], plain.weights)
    assert [row["step"] for row in ran.rows] == [1, 2]
    assert ran.states == [2]
    assert ran.of(RunFailed)[0].exit_code == 5


def test_a_stopped_run_goes_on_exactly_when_the_cause_is_gone(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = go({"checkpoint.every": 2}, "plain")
    with monkeypatch.context() as patch:
        poison(patch, lambda n: float("nan") if n == 6 else None)
        go({"checkpoint.every": 2})
    again = go({"checkpoint.every": 2}, resume=True)
    assert again.error is None
    assert again.losses == plain.losses
    assert same(again.weights, plain.weights)


def test_a_gradient_that_is_not_finite_stops_too(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    original = trainer.Trainer._gradients

    def spoil(self: trainer.Trainer, step: int) -> Any:
        result = original(self, step)
        if step == 1:
            next(iter(self.parts.trained.params.values())).grad.view(-1)[0] = float("nan")
        return result

    monkeypatch.setattr(trainer.Trainer, "_gradients", spoil)
    ran = go({})
    assert ran.error is not None
    assert ran.error.exit_code == 5
    assert "gradient norm nan at step 2" in str(ran.error)


def test_up_to_three_steps_in_a_row_are_skipped(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches 3 and 4 are step 2; a skipped step moves neither weights nor moments nor the average."""
    with monkeypatch.context() as patch:
        poison(patch, lambda n: float("nan") if n in (3, 4) else None)
        ran = go({"train.nonfinite": "skip_step", "checkpoint.every": 1, "checkpoint.keep": 9})
    assert ran.error is None
    assert "step 2 skipped" in ran.warnings
    assert ran.rows[1]["loss"] is None
    assert len(ran.of(StepEnded)) == 4
    for kind in ("weights", "optimizer", "ema"):
        assert same(ran.tensors(1, kind), ran.tensors(2, kind)), kind
        assert not same(ran.tensors(2, kind), ran.tensors(3, kind)), kind
    state = (ran.folder / "state" / "step-000002" / "state.json").read_text()
    assert '"skipped_in_row": 1' in state


def test_the_fourth_skipped_step_in_a_row_stops(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        poison(patch, lambda n: float("nan") if n >= 5 else None)  # from step 3 on
        ran = go({"train.nonfinite": "skip_step", "train.steps": 9})
    assert ran.error is not None
    assert ran.error.exit_code == 5
    assert ran.warnings.count("skipped") == 3
    assert [row["step"] for row in ran.rows] == [1, 2, 3, 4, 5]
    with monkeypatch.context() as patch:
        poison(patch, lambda n: float("nan") if n in (3, 4, 5, 6, 9, 10, 11, 12) else None)  # twice two in a row
        assert go({"train.nonfinite": "skip_step", "train.steps": 9}, "pairs").error is None


@pytest.mark.ledger("KS-13")
def test_fp16_overflow_is_the_scalers_business(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first scale of 65536 overflows with a loss this large; the run goes on with a lower one, which a resume remembers."""
    changes = {"train.precision": "fp16", "train.steps": 12, "train.max_grad_norm": 0, "checkpoint.every": 3}
    poison(monkeypatch, lambda n: 3e3)
    straight = go(changes, "straight")
    assert straight.error is None
    assert straight.warnings == ""
    scale = json.loads((straight.folder / "state" / "step-000012" / "state.json").read_text())["scaler"]["scale"]
    assert scale < 65536
    stop = go(changes, sinks=[lambda event: stop_after_five(event, straight.folder.parent / "run")])
    assert stop.error is not None
    again = go(changes, resume=True)
    assert again.losses == straight.losses
    assert same(again.weights, straight.weights)


def stop_after_five(event: Event, folder: Path) -> None:
    """Ask for a stop after step 5."""
    if isinstance(event, StepEnded) and event.step == 5:
        (folder / "STOP").touch()


def test_weights_that_are_not_finite_are_never_saved(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.optim.AdamW.step

    def spoil(self: torch.optim.AdamW, closure: None = None) -> None:
        original(self)
        self.param_groups[0]["params"][3].data.view(-1)[0] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    ran = go({"checkpoint.every": 1})
    assert ran.error is not None
    assert ran.error.exit_code == 5
    assert "nothing was saved" in str(ran.error)
    assert ran.states == []
    assert not (ran.folder / "weights").exists()


@pytest.mark.ledger("KS-13")
def test_fp16_weights_under_fp16_autocast(go: Go) -> None:
    """What sd-scripts calls full_fp16: the scaler unscales gradients that are fp16 themselves."""
    ran = go({**tiny_run.LORA, "train.precision": "fp16", "train.weights_dtype": "fp16", "train.accumulation": 1})
    assert ran.error is None
    assert any(value.dtype == torch.float16 and value.any() for name, value in ran.weights.items() if name.endswith("up"))
