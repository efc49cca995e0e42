"""What is said about an adapter file is true, and broken ones are found."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fluxsmith.adapters.formats.files import read_adapter, write_adapter
from fluxsmith.adapters.formats.state import AdapterState, LayerState, lora_part
from fluxsmith.adapters.load import norm_of
from fluxsmith.errors import ModelFileError
from fluxsmith.io.safetensors import open_weights, save_weights
from fluxsmith.tools.inspect import check, inspect


def lora(fixtures_root: Path, name: str) -> Path:
    return fixtures_root / f"flux-dev-lora-tiny/{name}.safetensors"


def tensors_of(path: Path) -> dict[str, Tensor]:
    with open_weights(path) as weights:
        return {name: weights.tensor(name) for name in weights}


def test_inspect_kohya(fixtures_root: Path) -> None:
    found = inspect(lora(fixtures_root, "kohya"))
    assert (found.kind, found.format, found.tensors) == ("lora", "kohya", 87)
    assert found.roles == {"dit": 29}
    assert found.ranks["img_attn"] == {3: 4}
    assert found.alphas["single"] == {2.0: 6}
    assert found.blocks == {"double_blocks": [0, 1], "single_blocks": [0, 1, 2]}
    assert found.metadata["ss_network_dim"] == "3"
    assert (found.problems, found.not_finite, found.split) == ((), (), False)
    assert set(found.norms) == {"double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1", "single_blocks.2"}


def test_norms_are_those_of_the_difference(fixtures_root: Path) -> None:
    path = lora(fixtures_root, "diffusers_peft")
    found, state = inspect(path), read_adapter(path)
    for block in ("double_blocks.0", "single_blocks.2"):
        deltas = [layer.delta() for name, layer in state.layers.items() if f".{block}." in name]
        assert found.norms[block] == pytest.approx(sum(float(delta.square().sum()) for delta in deltas) ** 0.5, rel=1e-4)
    layer = LayerState((lora_part("", 0, 3, torch.zeros(2, 4), torch.zeros(3, 2), 2.0),), 3)
    assert norm_of(layer) == 0


def test_inspect_text_encoders(fixtures_root: Path) -> None:
    found = inspect(fixtures_root / "text-encoder-lora-tiny/kohya.safetensors")
    assert found.roles == {"clip_l": 18, "t5xxl": 21}
    assert found.ranks == {"clip_l": {3: 18}, "t5xxl": {3: 21}}


@pytest.mark.parametrize(
    ("name", "kind", "ranks", "has_norms"),
    [
        ("lycoris_lokr", "lokr", {3}, True),
        ("lycoris_loha", "loha", {3}, True),
        ("lycoris_full_diff", "full", {0}, True),
        ("kohya_oft", "oft", {0}, False),
        ("lycoris_dora", "dora", {3}, False),
        ("xlabs", "lora", {3}, True),
        ("bfl_control", "control", {3}, True),
    ],
)
def test_other_kinds(fixtures_root: Path, name: str, kind: str, ranks: set[int], has_norms: bool) -> None:
    found = inspect(lora(fixtures_root, name))
    assert found.kind == kind
    assert {rank for counts in found.ranks.values() for rank in counts} == ranks
    assert bool(found.norms) is has_norms
    assert check(lora(fixtures_root, name)).is_sound


def test_no_adapter(fixtures_root: Path) -> None:
    for call in (inspect, check):
        with pytest.raises(ModelFileError, match="this is an autoencoder.*an adapter was expected"):
            call(fixtures_root / "ae-tiny/weights.safetensors")


def test_check_against_bases(fixtures_root: Path) -> None:
    path = lora(fixtures_root, "kohya")
    assert check(path, fixtures_root / "flux-dev-tiny/weights.safetensors").is_sound
    assert check(path).verdict.loads_in == ("sd-scripts", "ComfyUI", "Forge", "diffusers")
    small = check(path, fixtures_root / "flux-dev-small/weights.safetensors")
    assert "64 x 64 here and 24 x 24 in the base" in small.problems[0] or " here and " in small.problems[0]
    assert "more layers that do not fit" in small.problems[-1]
    chroma = check(path, fixtures_root / "chroma-tiny/weights.safetensors")
    assert not chroma.is_sound
    with pytest.raises(ModelFileError, match="a FLUX transformer was expected"):
        check(path, fixtures_root / "ae-tiny/weights.safetensors")


def test_check_text_encoders_against_their_base(fixtures_root: Path) -> None:
    path = fixtures_root / "text-encoder-lora-tiny/kohya.safetensors"
    assert check(path, fixtures_root / "clip_l-tiny/weights.safetensors").is_sound
    assert check(path, fixtures_root / "flux-dev-tiny/weights.safetensors").is_sound  # holds no text encoder: nothing to compare


def test_not_finite(fixtures_root: Path, tmp_path: Path) -> None:
    tensors = tensors_of(lora(fixtures_root, "kohya"))
    name = "lora_unet_single_blocks_1_linear2.lora_up.weight"
    tensors[name][0, 0] = float("nan")
    save_weights(tmp_path / "a.safetensors", tensors, {})
    assert inspect(tmp_path / "a.safetensors").not_finite == (name,)
    assert any("1 tensors are not finite" in problem for problem in check(tmp_path / "a.safetensors").problems)


def test_missing_half_alpha_zero_and_explosion(fixtures_root: Path, tmp_path: Path) -> None:
    path, whole = tmp_path / "a.safetensors", tensors_of(lora(fixtures_root, "kohya"))
    stem = "lora_unet_double_blocks_0_img_mlp_0"
    save_weights(path, {key: t for key, t in whole.items() if key != f"{stem}.lora_up.weight"}, {})
    assert f"{stem} has no up factor" in check(path).problems[0]
    save_weights(path, whole | {f"{stem}.alpha": torch.zeros(())}, {})
    assert "1 layers have alpha 0" in check(path).problems[0]
    save_weights(path, whole | {f"{stem}.lora_up.weight": whole[f"{stem}.lora_up.weight"] * 1e6}, {})
    assert "norm above 1000" in check(path).problems[0]


def test_untrained_layers_are_noted(tmp_path: Path) -> None:
    layer = LayerState((lora_part("", 0, 8, torch.randn(2, 8), torch.zeros(8, 2), 2.0),), 8)
    write_adapter(tmp_path / "a.safetensors", AdapterState({"dit.double_blocks.0.img_attn.proj": layer}))
    found = check(tmp_path / "a.safetensors")
    assert found.is_sound
    assert "1 of 1 layers are zero" in found.notes[0]


def test_adapter_of_another_model(tmp_path: Path) -> None:
    stem = "lora_unet_down_blocks_0_attn"
    save_weights(
        tmp_path / "a.safetensors", {f"{stem}.lora_down.weight": torch.zeros(1, 2), f"{stem}.lora_up.weight": torch.zeros(2, 1)}, {}
    )
    assert "Stable Diffusion" in check(tmp_path / "a.safetensors").problems[0]
