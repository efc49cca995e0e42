"""The planner's numbers: parameters exactly those of the public files, saved bytes those of autograd, peaks those of the known table."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fluxsmith.memory.plan import CONTEXT, GIB, Job, choose, cures, peak, predict, saved
from fluxsmith.memory.sizes import AUTOENCODER, CLIP_L, FORMS, T5XXL, Form, count, shapes_of

BENCH = Path(__file__).resolve().parents[2] / "bench" / "counters.py"
DEV = count(shapes_of(FORMS["dev"]))
LORA = Job(DEV, trained=3_502_080 * 16, state_bytes=2.0, kept=0, encode_batch=1)
SMALL = replace(LORA, tokens=1536, side=512)


def manifest(root: Path, name: str) -> dict[str, tuple[int, ...]]:
    found = json.loads((root / f"{name}.json").read_text())["tensors"]
    return {key: tuple(shape) for key, shape in found.items()}


@pytest.mark.ledger("FS-03")
@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_the_known_forms_are_the_files_tensor_by_tensor(manifests_root: Path, name: str) -> None:
    assert shapes_of(FORMS[name]) == manifest(manifests_root, f"flux1-{name}")


@pytest.mark.ledger("FS-03")
@pytest.mark.parametrize("name", ["flux1-dev", "flux1-fill-dev", "flux1-krea-dev", "flex2-preview", "chroma"])
def test_every_parameter_is_counted_once(manifests_root: Path, name: str) -> None:
    listing = json.loads((manifests_root / f"{name}.json").read_text())
    assert count(manifest(manifests_root, name)).total == listing["param_count"]


@pytest.mark.ledger("FS-03")
def test_parts_are_those_of_the_architecture(manifests_root: Path) -> None:
    assert DEV.total == 11_901_408_320
    assert DEV.modulation == 3_228_567_552
    assert sum(DEV.blocks) == 8_608_715_776
    assert (len(DEV.blocks), DEV.depth, DEV.hidden, DEV.mlp) == (57, 19, 3072, 12_288)
    assert DEV.row + 2 * 3072 == 1_056_768
    encoders = {"t5xxl": T5XXL, "clip_l": CLIP_L, "ae": AUTOENCODER}
    for name, size in encoders.items():
        assert json.loads((manifests_root / f"{name}.json").read_text())["param_count"] == size


# Predicted peaks in GiB for LoRA of rank 16, batch 1, 512 and 1024 px: low and high end (offloaded boundaries or not).
TABLE = {"": ((18.0, 18.0), (19.5, 19.5)), "int8": ((9.3, 10.0), (9.8, 11.5)), "nf4": ((5.6, 6.3), (6.1, 7.7))}


@pytest.mark.ledger("KS-50")
@pytest.mark.ledger("FS-03")
@pytest.mark.parametrize("quant", TABLE)
def test_peaks_are_within_a_tenth_of_the_table(quant: str) -> None:
    for job, (low, high) in zip((SMALL, LORA), TABLE[quant], strict=True):
        job = replace(job, quant=quant)
        assert peak(job, "train") / GIB == pytest.approx(high, rel=0.1)
        if low != high:
            assert peak(replace(job, offloaded=57), "train") / GIB == pytest.approx(low, rel=0.1)


def test_everything_streamed_in_8_bits_fits_a_card_of_4() -> None:
    for job, known in ((SMALL, 1.9), (LORA, 2.4)):
        everything = replace(job, quant="int8", offloaded=57, streamed=57)
        assert peak(everything, "train") / GIB == pytest.approx(known, rel=0.12)


@pytest.mark.ledger("FS-04")
def test_look_ahead_saves_what_the_layers_weigh() -> None:
    for quant, known in (("", 6.01), ("int8", 3.01)):
        job = replace(LORA, quant=quant)
        saves = peak(replace(job, lookahead=False), "train") - peak(job, "train")
        assert saves / GIB == pytest.approx(known - 64 * DEV.row * 2 / GIB, abs=0.01)


@pytest.mark.ledger("KS-50")
@pytest.mark.parametrize(
    ("card", "job"),
    [
        (24, replace(LORA, batch=2)),
        (16, replace(LORA, quant="int8")),
        (12, replace(LORA, quant="int8")),
        (10, replace(LORA, quant="int8", text="int8")),
        (8, replace(LORA, quant="nf4", text="int8")),
    ],
)
def test_every_card_of_the_table_has_a_plan_that_fits_in_every_phase(card: float, job: Job) -> None:
    choice = choose(job, card)
    assert choice.fits
    assert choice.job.quant == job.quant, "a plan never quantises"
    assert choice.job.streamed <= (6 if card == 10 else 0)
    assert peak(choice.job) <= card * GIB


@pytest.mark.ledger("ST-06")
@pytest.mark.parametrize(("quant", "known"), [("", 30), ("int8", 18), ("int4", 13), ("nf4", 9), ("int2", 9)])
def test_rank_16_on_every_component_fits_where_others_need_as_much(quant: str, known: float) -> None:
    job = replace(LORA, quant=quant, trained=4_786_176 * 16, text=quant or "bf16")
    assert choose(job, known).fits
    assert choose(job, known).job.streamed == 0
    assert peak(choose(job, known).job, "train") <= known * GIB


@pytest.mark.parametrize("card", [6, 8, 10, 12, 16, 24, 48, 80])
@pytest.mark.parametrize("quant", ["", "int8", "nf4"])
def test_a_choice_fills_the_card_and_never_breaks_it(card: float, quant: str) -> None:
    choice = choose(replace(LORA, quant=quant), card)
    assert choice.fits
    assert peak(choice.job, "train") <= card * GIB
    job = choice.job
    if job.streamed:
        assert (job.kept, job.selective) == (0, 0), "streamed blocks are recomputed"
        assert peak(replace(job, streamed=job.streamed - 1), "train") > card * GIB - 0.05 * GIB
    assert choice.why


def test_what_cannot_fit_is_said() -> None:
    assert not choose(LORA, 1.5).fits
    assert not choose(replace(LORA, is_full=True, trained=0, trained_width=2, state_bytes=8), 24).fits


@pytest.mark.ledger("FS-03")
def test_cures_are_what_a_new_prediction_says() -> None:
    job = replace(LORA, kept=57, lookahead=False)
    changes = cures(job)
    assert changes[0].text.startswith("memory.checkpointing")
    assert [change.text for change in changes[:2]][1] == 'memory.modulation = "lookahead"'
    for change in changes:
        assert change.saves == peak(job, "train") - peak(change.job, "train") > 0
    assert not any("fused" in change.text for change in changes)
    assert any("stream_blocks" in change.text for change in changes)
    assert cures(LORA, "encode captions")[0].text == "quant.text_encoders = true"


def test_phases_follow_the_job() -> None:
    names = [phase.name for phase in predict(LORA)]
    assert names == ["encode pictures", "encode captions", "load", "train", "save"]
    more = replace(LORA, quant="int8", sample_side=1024, caches=False, live_text=True)
    assert [phase.name for phase in predict(more)] == ["quantise", "load", "train", "sample", "save"]
    assert all(phase.device == sum(phase.parts.values()) for phase in predict(more))
    assert predict(LORA)[0].parts["context"] == CONTEXT
    on_host = predict(replace(LORA, on_card=False))
    assert all(phase.device == 0 and phase.host > sum(phase.parts.values()) for phase in on_host)


def test_a_smaller_model_needs_less_in_every_part() -> None:
    small = replace(LORA, counts=count(shapes_of(Form(depth=8))))
    assert all(one.device <= other.device for one, other in zip(predict(small), predict(LORA), strict=True))


@pytest.mark.ledger("FS-03")
@pytest.mark.parametrize(("checkpointed", "kept"), [(False, 12), (True, 0)])
def test_saved_bytes_are_those_that_autograd_keeps(checkpointed: bool, kept: int) -> None:
    """The small model of bench/counters.py, counted with saved-tensor hooks."""
    spec = importlib.util.spec_from_file_location("counters", BENCH)
    assert spec is not None
    assert spec.loader is not None
    counters = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(counters)
    p = counters.PARAMS
    form = Form(p.hidden_size, p.mlp_hidden, 128, p.depth, p.depth_single_blocks, p.context_in_dim, p.vec_in_dim)
    job = Job(count(shapes_of(form)), base="fp32", tokens=(counters.SIDE // 2) ** 2 + counters.TEXT, kept=kept)
    assert saved(job) / 1e6 == pytest.approx(counters.measure(checkpointed=checkpointed)["saved_mb"], rel=0.1)
