"""Files in other names do the same; there and back gives the same bytes of every tensor where nothing has to be folded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import LAYERS, deltas_of, diffusers_folder, metadata_of, tensors_of

from fluxsmith.adapters.formats.files import read_adapter, write_adapter
from fluxsmith.adapters.formats.state import AdapterState, LayerState, lora_part
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.io.identify import identify
from fluxsmith.io.safetensors import save_weights
from fluxsmith.models.load import load_dit
from fluxsmith.tools.convert import ConvertReport, ConvertRequest, ModelConvertRequest, convert, convert_model
from fluxsmith.tools.inspect import inspect

MakeLora = Callable[..., Path]
LoraFile = Callable[[str], Path]


def to(source: Path, target: Path, name: str, **options: Any) -> ConvertReport:
    return convert(ConvertRequest(source, target, to=name, **options))


@pytest.mark.ledger("FS-09")
@pytest.mark.ledger("KS-46")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("there", ["peft", "ai_toolkit", "comfy", "onetrainer", "lycoris", "bfl_peft", "diffsynth"])
def test_there_and_back_is_exact(make_lora: MakeLora, tmp_path: Path, there: str, dtype: torch.dtype) -> None:
    """alpha = rank, as in files of formats without alpha."""
    lora = make_lora("a", seed=1, rank=4, alpha=4.0, dtype=dtype)
    report = to(lora, tmp_path / "there.safetensors", there)
    back = to(tmp_path / "there.safetensors", tmp_path / "back.safetensors", "kohya")
    before, after = tensors_of(lora), tensors_of(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert not report.rounded
    assert back.layers == len(LAYERS)
    a, b = metadata_of(lora), metadata_of(tmp_path / "back.safetensors")
    assert a == b  # hashes of the same tensors, and every entry kept


@pytest.mark.ledger("KS-46")
def test_fp32_folds_without_rounding(make_lora: MakeLora, tmp_path: Path) -> None:
    """A strength of 1/3 on bf16 factors is rounded in bf16; in fp32 the effect stays."""
    lora = make_lora("a", seed=1, rank=3, alpha=1.0, dtype=torch.bfloat16)
    expected, errors = deltas_of(lora), []
    for dtype in (None, "fp32"):
        to(lora, tmp_path / f"{dtype}.safetensors", "diffsynth", **({"dtype": dtype} if dtype else {}))
        made = deltas_of(tmp_path / f"{dtype}.safetensors")
        errors.append(max(float((made[name] - expected[name]).abs().max()) for name in made))
    assert errors[0] > 1e-5
    assert errors[1] < 1e-6


@pytest.mark.ledger("KS-46")
@pytest.mark.parametrize("form", ["kohya", "peft", "ai_toolkit", "comfy", "onetrainer", "lycoris", "bfl_peft", "diffsynth"])
def test_any_strength_keeps_its_effect(lora_file: LoraFile, tmp_path: Path, form: str) -> None:
    report = to(lora_file("kohya"), tmp_path / "out.safetensors", form)
    expected, made = deltas_of(lora_file("kohya")), deltas_of(tmp_path / "out.safetensors")
    assert made.keys() == expected.keys()
    assert max(float((made[name] - expected[name]).abs().max()) for name in made) < 1e-6
    assert (report.source_format, report.format, report.layers) == ("kohya", form, 29)


@pytest.mark.ledger("KS-46")
def test_source_is_recognised(lora_file: LoraFile, tmp_path: Path) -> None:
    names = {
        "kohya": "kohya", "diffusers_peft_alpha_metadata": "peft", "ai_toolkit": "ai_toolkit", "comfy_bfl_peft": "comfy", "xlabs": "xlabs",
        "diffsynth": "diffsynth", "onetrainer_lora_transformer": "onetrainer", "bfl_peft_base_model": "bfl_peft",
        "lycoris_prefix_diffusers_lokr": "lycoris", "kohya_split_qkv": "kohya", "lycoris_lokr": "kohya",
    }  # fmt: skip
    for file, form in names.items():
        assert to(lora_file(file), tmp_path / f"{file}.safetensors", form if form != "kohya" else "comfy").source_format == form


@pytest.mark.ledger("KS-46")
def test_split_qkv_files_shrink(tmp_path: Path) -> None:
    """sd-scripts' block-diagonal factors come apart into small ones, and go together again to the bit."""
    width, mlp, rank = 24, 96, 4
    spans = {"dit.double_blocks.0.img_attn.qkv": [width] * 3, "dit.single_blocks.0.linear1": [width, width, width, mlp]}
    layers = {}
    for path, heights in spans.items():
        starts = [sum(heights[:number]) for number in range(len(heights))]
        parts = tuple(
            lora_part(name, start, start + rows, torch.randn(rank, width), torch.randn(rows, rank), rank)
            for name, start, rows in zip(("q", "k", "v", "mlp"), starts, heights, strict=False)
        )
        layers[path] = LayerState(parts, sum(heights))
    write_adapter(tmp_path / "kohya.safetensors", AdapterState(layers), dtype=torch.float32)
    report = to(tmp_path / "kohya.safetensors", tmp_path / "out.safetensors", "ai_toolkit")
    before, after = inspect(tmp_path / "kohya.safetensors"), inspect(tmp_path / "out.safetensors")
    assert (before.ranks["img_attn"], before.ranks["single"]) == ({12: 1}, {16: 1})
    assert (after.ranks["img_attn"], after.ranks["single"], after.split) == ({4: 1}, {4: 1}, True)
    assert report.bytes_after < 0.7 * report.bytes_before
    to(tmp_path / "out.safetensors", tmp_path / "back.safetensors", "kohya")
    first, second = tensors_of(tmp_path / "kohya.safetensors"), tensors_of(tmp_path / "back.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.ledger("KS-46")
def test_parts_that_share_a_factor_become_one(lora_file: LoraFile, tmp_path: Path) -> None:
    """The fixture's q, k and v have one down factor three times: a third of it is left after the way there and back."""
    to(lora_file("kohya_split_qkv"), tmp_path / "out.safetensors", "ai_toolkit")
    report = to(tmp_path / "out.safetensors", tmp_path / "back.safetensors", "kohya")
    assert inspect(lora_file("kohya_split_qkv")).ranks["img_attn"] == {9: 2, 3: 2}
    assert inspect(tmp_path / "back.safetensors").ranks["img_attn"] == {3: 4}
    assert report.bytes_after < 0.7 * lora_file("kohya_split_qkv").stat().st_size
    before, after = deltas_of(lora_file("kohya_split_qkv")), deltas_of(tmp_path / "back.safetensors")
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-6


@pytest.mark.ledger("KS-46")
@pytest.mark.parametrize("form", ["peft", "ai_toolkit", "comfy", "onetrainer"])
def test_text_encoders_are_kept(fixtures_root: Path, tmp_path: Path, form: str) -> None:
    """sd-scripts' converter drops them."""
    source = fixtures_root / "text-encoder-lora-tiny/kohya.safetensors"
    to(source, tmp_path / "out.safetensors", form)
    to(tmp_path / "out.safetensors", tmp_path / "back.safetensors", "kohya")
    expected, made = deltas_of(source), deltas_of(tmp_path / "back.safetensors")
    assert made.keys() == expected.keys()
    assert max(float((made[name] - expected[name]).abs().max()) for name in made) < 1e-6


@pytest.mark.ledger("FS-09")
@pytest.mark.ledger("KS-46")
@pytest.mark.parametrize(
    ("file", "form", "says"),
    [
        ("lycoris_lokr", "peft", "plain LoRA and DoRA over LoRA|LoRA and DoRA over LoRA only"),
        ("lycoris_dora", "diffsynth", "plain LoRA only.*extract a LoRA"),
        ("kohya_oft", "onetrainer", "rotation|only sd-scripts' format"),
        ("lycoris_boft", "ai_toolkit", "mixes rows"),
        ("bfl_control", "kohya", "no place for whole parameters"),
        ("kohya", "xlabs", "has no layer"),
        ("xlabs", "kohya", "size cannot be told.*base model"),
    ],
)
def test_no_exact_form_is_refused_with_the_reason(lora_file: LoraFile, tmp_path: Path, file: str, form: str, says: str) -> None:
    with pytest.raises(ModelFileError, match=says):
        to(lora_file(file), tmp_path / "out.safetensors", form)
    assert not (tmp_path / "out.safetensors").exists()


def test_sizes_from_the_base(base: Path, lora_file: LoraFile, tmp_path: Path) -> None:
    to(lora_file("xlabs"), tmp_path / "out.safetensors", "kohya", base=base)
    expected, made = deltas_of(lora_file("xlabs"), base), deltas_of(tmp_path / "out.safetensors")
    assert max(float((made[name] - expected[name]).abs().max()) for name in expected) < 1e-6


def test_metadata_is_true(make_lora: MakeLora, tmp_path: Path) -> None:
    lora = make_lora("a", seed=1, rank=3, alpha=2.0, dtype=torch.bfloat16)
    report = to(lora, tmp_path / "out.safetensors", "peft")
    before, after = metadata_of(lora), metadata_of(tmp_path / "out.safetensors")
    assert (before["ss_network_alpha"], after["ss_network_alpha"], after["ss_network_dim"]) == ("2.0", "3.0", "3")
    assert after["modelspec.title"] == "a"
    assert after["sshs_model_hash"] != before["sshs_model_hash"]
    assert "lora_adapter_metadata" in after
    assert report.rounded  # 2 / 3 went into bf16 factors
    to(tmp_path / "out.safetensors", tmp_path / "back.safetensors", "kohya")
    assert "lora_adapter_metadata" not in metadata_of(tmp_path / "back.safetensors")
    to(lora, tmp_path / "fp32.safetensors", "peft", dtype="fp32", has_metadata=False)
    assert not any(key.startswith(("ss_", "modelspec")) for key in metadata_of(tmp_path / "fp32.safetensors"))
    assert {value.dtype for value in tensors_of(tmp_path / "fp32.safetensors").values()} == {torch.float32}


def test_mistakes(make_lora: MakeLora, base: Path, tmp_path: Path) -> None:
    lora = make_lora("a", seed=1)
    with pytest.raises(ConfigError, match="no adapter format 'diffuser'"):
        to(lora, tmp_path / "out.safetensors", "diffuser")
    with pytest.raises(ConfigError, match="in kohya names, peft was said"):
        to(lora, tmp_path / "out.safetensors", "kohya", expects="peft")
    with pytest.raises(ModelFileError, match="an adapter was expected"):
        to(base, tmp_path / "out.safetensors", "kohya")
    with pytest.raises(ConfigError, match="add --overwrite"):
        to(lora, lora, "peft")
    to(lora, lora, "peft", overwrite=True)
    assert read_adapter(lora).format == "peft"


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.ledger("KS-46")
def test_a_diffusers_folder_becomes_one_file(base: Path, tmp_path: Path) -> None:
    folder = diffusers_folder(base, tmp_path / "model")
    report = convert_model(ModelConvertRequest(folder, tmp_path / "out.safetensors"))
    before, after = tensors_of(base), tensors_of(tmp_path / "out.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert identify(tmp_path / "out.safetensors").key_style == "bfl"
    assert report["tensors"] == len(before)
    assert metadata_of(tmp_path / "out.safetensors")["modelspec.architecture"] == "flux-1-dev"
    convert_model(ModelConvertRequest(folder, tmp_path / "bf16.safetensors", dtype="bf16"))
    load_dit(tmp_path / "bf16.safetensors", axes_dim=(4, 6, 6))
    with pytest.raises(ConfigError, match="--overwrite"):
        convert_model(ModelConvertRequest(folder, tmp_path / "bf16.safetensors"))


def test_parts_of_an_all_in_one_file(base: Path, fixtures_root: Path, tmp_path: Path) -> None:
    ae = tensors_of(fixtures_root / "ae-tiny/weights.safetensors")
    both = {f"model.diffusion_model.{name}": value for name, value in tensors_of(base).items()} | {
        f"vae.{name}": value for name, value in ae.items()
    }
    save_weights(tmp_path / "all.safetensors", both, {})
    for role, expected in (("ae", ae), ("dit", tensors_of(base))):
        convert_model(ModelConvertRequest(tmp_path / "all.safetensors", tmp_path / f"{role}.safetensors", role=role))
        made = tensors_of(tmp_path / f"{role}.safetensors")
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[name], expected[name]) for name in made)
