"""Files on models: control LoRAs change the base only while attached, wrong models are refused by name, tools get every kind's delta."""

import copy
from pathlib import Path

import pytest
import torch
from small_layer import random, whole
from torch import nn

from fluxsmith.adapters.base import linear_layers
from fluxsmith.adapters.formats.files import read_adapter, write_adapter
from fluxsmith.adapters.formats.state import AdapterState, LayerState, lora_part
from fluxsmith.adapters.load import from_state, load_adapter, norm_of
from fluxsmith.adapters.lora import Config
from fluxsmith.errors import ModelFileError
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.stream import Tokens

PROJ = "dit.double_blocks.0.img_attn.proj"
SCALE = "double_blocks.0.img_attn.norm.key_norm.scale"


def file(fixtures_root: Path, name: str) -> Path:
    return fixtures_root / f"flux-dev-lora-tiny/{name}.safetensors"


def test_a_control_lora_leaves_the_model_as_it_was(dit: FluxDiT, fixtures_root: Path) -> None:
    before = {name: param.detach().clone() for name, param in dit.named_parameters()}
    made = load_adapter(file(fixtures_root, "bfl_control"), {"dit": dit}, strength=0.3)
    assert dit.img_in.weight.shape == (64, 128)
    assert dit.img_in.in_features == 128
    assert torch.equal(dit.img_in.weight[:, :64], before["img_in.weight"])
    replaced = read_adapter(file(fixtures_root, "bfl_control")).replaced
    assert len(replaced) == 14
    assert torch.equal(dit.get_parameter(SCALE), replaced[f"dit.{SCALE}"])  # in full at any strength
    made.detach()
    after = dict(dit.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert dit.img_in.in_features == 64


def test_a_merged_control_lora_stays(dit: FluxDiT, fixtures_root: Path) -> None:
    load_adapter(file(fixtures_root, "bfl_control"), {"dit": dit}).merge()
    assert dit.img_in.in_features == 128
    assert torch.equal(dit.get_parameter(SCALE), read_adapter(file(fixtures_root, "bfl_control")).replaced[f"dit.{SCALE}"])
    assert dit(_tokens(128)).isfinite().all()


def _tokens(channels: int) -> Tokens:
    return Tokens(
        torch.randn(1, 4, channels), torch.zeros(1, 4, 3), torch.randn(1, 2, 48), torch.zeros(1, 2, 3), torch.randn(1, 40),
        torch.tensor([0.5]), torch.tensor([1.0]),
    )  # fmt: skip


def test_replaced_parameters_must_exist(dit: FluxDiT) -> None:
    for name, value, message in (
        ("dit.double_blocks.9.img_attn.norm.key_norm.scale", torch.ones(16), "replaces dit.double_blocks.9.*does not have"),
        (f"dit.{SCALE}", torch.ones(8), r"is \(8,\) in the adapter file, \(16,\) in the model"),
    ):
        made = from_state(AdapterState({}, replaced={name: value}), linear_layers({"dit": dit}))
        with pytest.raises(ModelFileError, match=message):
            made.attach({"dit": dit})


def test_only_control_loras_may_widen_the_input(dit: FluxDiT, tmp_path: Path) -> None:
    layer = LayerState((lora_part("", 0, 64, torch.randn(2, 128), torch.randn(64, 2), 2.0),), 64)
    write_adapter(tmp_path / "fill.safetensors", AdapterState({"dit.img_in": layer}), dtype=None)
    with pytest.raises(ModelFileError, match=r"fill\.safetensors: .*another size at dit.img_in \(64 x 128 against 64 x 64\)"):
        load_adapter(tmp_path / "fill.safetensors", {"dit": dit})


def test_files_for_other_models_are_named(dit: FluxDiT, fixtures_root: Path) -> None:
    with pytest.raises(ModelFileError, match=r"kohya\.safetensors: the adapter file has layers that have no place: clip_l"):
        load_adapter(fixtures_root / "text-encoder-lora-tiny/kohya.safetensors", {"dit": dit})


def test_one_set_may_mix_kinds(dit: FluxDiT, fixtures_root: Path, tmp_path: Path) -> None:
    names = ("lycoris_lokr", "lycoris_ia3", "kohya")
    layers = {}
    for number, name in enumerate(names):
        state = read_adapter(file(fixtures_root, name))
        layers |= {path: layer for path, layer in list(state.layers.items())[number::3] if path not in layers}
    write_adapter(tmp_path / "mixed.safetensors", AdapterState(layers), dtype=None)
    made = load_adapter(tmp_path / "mixed.safetensors", {"dit": dit})
    assert {layer.kind for layer in read_adapter(tmp_path / "mixed.safetensors").layers.values()} == {"lokr", "ia3", "lora"}
    x = torch.randn(2, 64)
    for path in (path for path in made.adapters if made.bases[path].in_features == 64):
        base = made.bases[path]
        merged = x @ (base.weight + made.adapters[path].delta(base.weight)).T + base.bias
        assert torch.allclose(base(x), merged, atol=1e-4)


def test_adapters_survive_a_copy_of_the_model(dit: FluxDiT) -> None:
    """A copy's adapters belong to the copy's layers."""
    made = Config(rank=2, targets="attention").build({"dit": dit})
    again = copy.deepcopy(dit)
    part = again.double_blocks[0].img_attn.qkv.adapters["adapter"].members()[0]
    assert part.base_ref[0] is again.double_blocks[0].img_attn.qkv
    assert part.base_ref[0] is not made.bases["dit.double_blocks.0.img_attn.qkv"]


def test_norms_of_files(models: dict[str, nn.Module], fixtures_root: Path) -> None:
    for name, known in (
        ("kohya", True),
        ("lycoris_lokr", True),
        ("lycoris_full_diff", True),
        ("lycoris_dora", False),
        ("kohya_oft", False),
    ):
        path, layer = next(iter(read_adapter(file(fixtures_root, name)).layers.items()))
        adapters = load_adapter(file(fixtures_root, name), models)
        norm = norm_of(layer)
        assert (norm is not None) is known
        if norm is not None:
            assert norm == pytest.approx(adapters.adapters[path].delta(adapters.bases[path].weight).norm().item(), rel=1e-4)
        adapters.detach()
    assert norm_of(LayerState((whole("full", diff=random(36, 12)),), 36, 12))
