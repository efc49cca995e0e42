"""`model quantize`: files in few bits are read back strictly, named, taken as they are by a run of the same kind, and small."""

import json
from pathlib import Path

import pytest
import torch
from quantised import relative
from typer.testing import CliRunner

from fluxsmith.cli.model import app
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.io.identify import identify
from fluxsmith.io.safetensors import open_weights, save_weights
from fluxsmith.io.scaled import open_scaled
from fluxsmith.models.load import load_dit, load_t5xxl
from fluxsmith.quant.base import QuantLinear, by_block, plugin, quantise
from fluxsmith.tools.quantize import KINDS, QuantizeRequest, quantize

ERRORS = {"fp8": 0.03, "int8": 0.01, "int4": 0.11, "int2": 0.4, "nf4": 0.11}
LAYER = "double_blocks.0.img_attn.qkv"


@pytest.mark.ledger("ST-05")
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_written_and_read_back(base: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "small.safetensors"
    report = quantize(QuantizeRequest(base, target, kind))
    assert report.role == "dit"
    assert set(report.layers) == {kind, "int8"} - ({"int8"} if kind == "fp8" else set())
    assert target.stat().st_size - report.bytes_after < 50_000
    found = identify(target)
    assert (found.family, found.role, found.variant, found.unusable, found.problems) == ("flux1", "dit", "dev", (), ())
    assert f"weights are stored in {'8 bits with scales' if kind in ('fp8', 'int8') else kind}" in " ".join(found.notes)
    assert found.sizes["parameters"] == identify(base).sizes["parameters"]
    plain, read = load_dit(base), load_dit(target)  # dequantised
    for (name, one), other in zip(read.named_parameters(), plain.parameters(), strict=True):
        if name == f"{LAYER}.weight":
            assert 0 < relative(one, other) < ERRORS[kind]
        if "_blocks." not in name or name.endswith("bias"):
            assert torch.equal(one, other)


@pytest.mark.ledger("ST-05")
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_the_same_kind_takes_the_tensors_as_they_are(base: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "small.safetensors"
    quantize(QuantizeRequest(base, target, kind))
    config = plugin(kind)
    taken = load_dit(target, by_block=by_block(config, "dit", torch.device("cpu")))
    made = load_dit(base)
    quantise(config, "dit", made)
    layers = {path: one for path, one in made.named_modules() if isinstance(one, QuantLinear)}
    assert {path for path, one in taken.named_modules() if isinstance(one, QuantLinear)} == set(layers)
    for path, one in layers.items():
        other = taken.get_submodule(path)
        assert isinstance(other, type(one))
        assert all(torch.equal(tensor.float(), other.parts()[part].float()) for part, tensor in one.parts().items())
        assert torch.equal(one.bias, other.bias)
    assert not [name for name, param in taken.named_parameters() if param.is_meta]


def test_a_run_of_another_kind_reads_what_they_stand_for(base: Path, tmp_path: Path) -> None:
    quantize(QuantizeRequest(base, tmp_path / "small.safetensors", "int8"))
    taken = load_dit(tmp_path / "small.safetensors", by_block=by_block(plugin("int4"), "dit", torch.device("cpu")))
    layer = taken.get_submodule(LAYER)
    assert isinstance(layer, QuantLinear)
    assert layer.form == "int4"
    assert relative(layer.dequantize(), load_dit(base).get_submodule(LAYER).weight) < 0.12


@pytest.mark.ledger("KS-21")
def test_scaled_files_of_others_load_right(base: Path, tmp_path: Path) -> None:
    """One scale for a tensor, as ComfyUI and sd-scripts' converter write it: not silently wrong by that factor."""
    with open_weights(base) as weights:
        tensors = {name: weights.tensor(name) for name in weights}
    plain = tensors[f"{LAYER}.weight"].float()
    scale = plain.abs().max() / 448
    tensors |= {
        f"{LAYER}.weight": (plain / scale).to(torch.float8_e4m3fn),
        f"{LAYER}.scale_weight": scale,
        "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
    }
    save_weights(tmp_path / "scaled.safetensors", tensors)
    assert relative(load_dit(tmp_path / "scaled.safetensors").get_submodule(LAYER).weight, plain) < 0.04
    kept = load_dit(tmp_path / "scaled.safetensors", by_block=by_block(plugin("fp8"), "dit", torch.device("cpu"))).get_submodule(LAYER)
    assert isinstance(kept, QuantLinear)
    assert torch.equal(kept.weight.view(torch.float8_e4m3fn).float(), tensors[f"{LAYER}.weight"].float())
    assert relative(kept.dequantize(), plain) < 0.04


def test_text_encoders(fixtures_root: Path, tmp_path: Path) -> None:
    given = fixtures_root / "t5-tiny/weights.safetensors"
    report = quantize(QuantizeRequest(given, tmp_path / "t5.safetensors", "int8"))
    assert report.role == "t5xxl"
    assert identify(tmp_path / "t5.safetensors").role == "t5xxl"
    one, other = load_t5xxl(tmp_path / "t5.safetensors"), load_t5xxl(given)
    ids = torch.tensor([[3, 5, 7]])
    assert 0 < relative(one.model(ids).last_hidden_state, other.model(ids).last_hidden_state) < 0.03


def test_a_packed_weight_without_its_parts_is_missing(base: Path, tmp_path: Path) -> None:
    quantize(QuantizeRequest(base, tmp_path / "small.safetensors", "int4"))
    with open_weights(tmp_path / "small.safetensors") as weights:
        tensors = {name: weights.tensor(name) for name in weights if name != f"{LAYER}.weight_int4_scale"}
    save_weights(tmp_path / "cut.safetensors", tensors)
    with pytest.raises(ModelFileError, match=f"missing: {LAYER}.weight"):
        load_dit(tmp_path / "cut.safetensors")


def test_the_verb(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "a" / "small.safetensors"
    arguments = ["quantize", str(base), "--to", "int4", "--out", str(target), "--exclude", "txt_", "--modulation", "keep", "--group", "32"]
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert "would write" in dry.stdout
    assert not target.exists()
    done = CliRunner().invoke(app, [*arguments, "--json"])
    record = json.loads(done.stdout)
    assert (done.exit_code, set(record["layers"])) == (0, {"int4"})
    assert record["bytes_after"] < record["bytes_before"]
    with open_scaled(target) as weights:
        assert json.loads(weights.metadata["fluxsmith.quant"]) == {"kind": "int4", "exclude": ["txt_"], "modulation": "keep", "group": 32}
        assert f"{LAYER}.weight" in weights.scaled
        assert not [name for name in weights.scaled if "txt_" in name or "mod" in name]
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, ConfigError)


def test_bad_settings_are_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use one of fp8"):
        quantize(QuantizeRequest(base, tmp_path / "x.safetensors", "int5"))
    with pytest.raises(ConfigError, match=r"group.*its options are"):
        quantize(QuantizeRequest(base, tmp_path / "x.safetensors", "int4", {"group": 7}))
    quantize(QuantizeRequest(base, tmp_path / "x.safetensors", "int8"))
    assert "lose twice" in quantize(QuantizeRequest(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "int4")).notes[0]
