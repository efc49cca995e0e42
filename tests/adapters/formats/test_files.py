"""Writing and reading in both formats is exact; what is broken is refused with the layer's name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fluxsmith.adapters.formats import kohya, peft
from fluxsmith.adapters.formats.files import read_adapter, write_adapter
from fluxsmith.adapters.formats.fused import fuse
from fluxsmith.adapters.formats.state import AdapterState, LayerState, Part, lora_part
from fluxsmith.errors import ModelFileError
from fluxsmith.io.safetensors import open_weights, save_weights

WIDTH, MLP = 8, 32


def random_part(name: str, start: int, stop: int, rank: int, alpha: float, width: int = WIDTH) -> Part:
    return lora_part(name, start, stop, torch.randn(rank, width), torch.randn(stop - start, rank), alpha)


def state() -> AdapterState:
    """Whole layers, split layers with equal and with differing strengths, parts missing, the swapped layer, text encoders."""
    torch.manual_seed(0)
    qkv = [(name, i * WIDTH, (i + 1) * WIDTH) for i, name in enumerate("qkv")]
    layers = {
        "dit.double_blocks.0.img_attn.qkv": LayerState((random_part("", 0, 3 * WIDTH, 4, 2.0),), 3 * WIDTH),
        "dit.double_blocks.0.txt_attn.qkv": LayerState(tuple(random_part(*row, 2, 1.0) for row in qkv), 3 * WIDTH),
        "dit.double_blocks.1.img_attn.qkv": LayerState(tuple(random_part(*row, 2 + i, 3.0) for i, row in enumerate(qkv)), 3 * WIDTH),
        "dit.double_blocks.1.txt_attn.qkv": LayerState((random_part(*qkv[0], 3, 1.5), random_part(*qkv[2], 3, 1.5)), 3 * WIDTH),
        "dit.double_blocks.0.img_mlp.2": LayerState((random_part("", 0, WIDTH, 3, 3.0, MLP),), WIDTH),
        "dit.single_blocks.0.linear1": LayerState((random_part("", 0, 3 * WIDTH + MLP, 2, 4.0),), 3 * WIDTH + MLP),
        "dit.single_blocks.1.linear1": LayerState((random_part("mlp", 3 * WIDTH, 3 * WIDTH + MLP, 2, 4.0),), 3 * WIDTH + MLP),
        "dit.single_blocks.1.modulation.lin": LayerState((random_part("", 0, 3 * WIDTH, 1, 0.5),), 3 * WIDTH),
        "dit.final_layer.adaLN_modulation.1": LayerState((random_part("", 0, 2 * WIDTH, 2, 1.0),), 2 * WIDTH),
        "dit.time_in.in_layer": LayerState((random_part("", 0, WIDTH, 2, 1.0),), WIDTH),
        "clip_l.text_model.encoder.layers.1.self_attn.out_proj": LayerState((random_part("", 0, WIDTH, 2, 1.0),), WIDTH),
        "t5xxl.encoder.block.2.layer.1.DenseReluDense.wi_0": LayerState((random_part("", 0, MLP, 2, 1.0),), MLP),
    }
    return AdapterState(layers)


@pytest.mark.ledger("KS-08")
@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_round_trip_keeps_every_delta(tmp_path: Path, form: str) -> None:
    written = state()
    write_adapter(tmp_path / "a.safetensors", written, format=form, dtype=torch.float32, metadata={"ss_x": "1"})  # type: ignore[arg-type]
    read = read_adapter(tmp_path / "a.safetensors")
    assert read.format == form
    assert read.metadata["ss_x"] == "1"
    assert len(read.metadata["sshs_model_hash"]) == 64
    assert read.layers.keys() == written.layers.keys()
    for path, layer in written.layers.items():
        if read.layers[path].out_features is not None:
            assert torch.allclose(read.layers[path].delta(), layer.delta(), atol=1e-5), path


def test_kohya_names_and_shapes(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", state(), dtype=torch.bfloat16)
    with open_weights(tmp_path / "a.safetensors") as weights:
        infos = weights.infos
        assert infos["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (4, WIDTH)
        assert infos["lora_unet_double_blocks_0_txt_attn_qkv.lora_down.weight"].shape == (6, WIDTH)
        assert infos["lora_unet_double_blocks_0_txt_attn_qkv.lora_up.weight"].shape == (3 * WIDTH, 6)
        assert weights.tensor("lora_unet_double_blocks_0_txt_attn_qkv.alpha").item() == 3.0  # 1/2 of the stored rank 6
        assert infos["lora_te1_text_model_encoder_layers_1_self_attn_out_proj.alpha"].shape == ()
        assert "lora_te3_encoder_block_2_layer_1_DenseReluDense_wi_0.lora_up.weight" in infos
        assert {infos[name].dtype for name in infos if not name.endswith("alpha")} == {"BF16"}


def test_whole_layers_keep_their_factors_in_kohya() -> None:
    written = state()
    tensors, _ = kohya.write(written, torch.float32)
    part = written.layers["dit.double_blocks.0.img_attn.qkv"].parts[0]
    assert torch.equal(tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], part.down)
    assert torch.equal(tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"], part.up)
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.alpha"].item() == 2.0


def test_peft_shares_the_down_factor_and_says_its_ranks() -> None:
    tensors, metadata = peft.write(state(), torch.float32)
    names = [f"transformer.transformer_blocks.0.attn.to_{x}.lora_A.weight" for x in "qkv"]
    assert torch.equal(tensors[names[0]], tensors[names[2]])
    assert '"transformer.r": 2' in metadata["lora_adapter_metadata"]
    assert '"transformer_blocks.0.attn.to_q": 4' in metadata["lora_adapter_metadata"]
    assert '"text_encoder.lora_alpha": 2' in metadata["lora_adapter_metadata"]
    assert not any(".alpha" in name for name in tensors)


def test_shared_down_factors_become_one_layer_again(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", state(), format="peft", dtype=torch.float32)
    read = read_adapter(tmp_path / "a.safetensors").layers
    assert [part.name for part in read["dit.double_blocks.0.img_attn.qkv"].parts] == [""]
    assert read["dit.double_blocks.0.img_attn.qkv"].rank == 4
    assert [part.name for part in read["dit.double_blocks.0.txt_attn.qkv"].parts] == ["q", "k", "v"]


def test_fuse_with_differing_strengths() -> None:
    layer = state().layers["dit.double_blocks.1.img_attn.qkv"]
    whole = fuse(layer)
    assert whole.rank == 2 + 3 + 4
    assert torch.allclose(whole.scale * (whole.up @ whole.down), layer.delta(), atol=1e-5)


def test_a_part_alone_does_not_tell_the_layers_height(tmp_path: Path) -> None:
    only_q = AdapterState({"dit.single_blocks.0.linear1": LayerState((random_part("q", 0, WIDTH, 2, 2.0),), 3 * WIDTH + MLP)})
    write_adapter(tmp_path / "a.safetensors", only_q, format="peft")
    read = read_adapter(tmp_path / "a.safetensors").layers["dit.single_blocks.0.linear1"]
    assert read.out_features is None
    with pytest.raises(ModelFileError, match="cannot be told from this file"):
        read.delta()


def kohya_tensors() -> dict[str, Tensor]:
    name = "lora_unet_double_blocks_0_img_attn_proj"
    return {f"{name}.lora_down.weight": torch.randn(2, 8), f"{name}.lora_up.weight": torch.randn(8, 2), f"{name}.alpha": torch.tensor(2.0)}


def without(tensors: dict[str, Tensor], ending: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(ending)}


BROKEN: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "has no up factor": lambda t: without(t, "up.weight"),
    "has no down factor": lambda t: without(t, "down.weight"),
    "do not fit together": lambda t: t | {"lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.randn(8, 3)},
    "is not one number": lambda t: t | {"lora_unet_double_blocks_0_img_attn_proj.alpha": torch.ones(2)},
    "no FLUX layer is called": lambda t: {key.replace("img_attn_proj", "img_attn_nothing"): tensor for key, tensor in t.items()},
    "are no part of a LoRA": lambda t: t | {"something.else": torch.ones(1)},
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_files_are_refused(tmp_path: Path, message: str) -> None:
    save_weights(tmp_path / "cats.safetensors", BROKEN[message](kohya_tensors()), {})
    with pytest.raises(ModelFileError, match=message) as caught:
        read_adapter(tmp_path / "cats.safetensors")
    assert "cats.safetensors" in str(caught.value)
    assert caught.value.exit_code == 4


def test_a_base_model_is_no_adapter(fixtures_root: Path) -> None:
    with pytest.raises(ModelFileError, match="this is a FLUX transformer.*an adapter was expected"):
        read_adapter(fixtures_root / "flux-dev-tiny/weights.safetensors")


def test_alpha_is_optional(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.safetensors", without(kohya_tensors(), "alpha"), {})
    (layer,) = read_adapter(tmp_path / "a.safetensors").layers.values()
    assert layer.parts[0].scale == 1


def test_rslora_in_the_header(tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn.to_out.0"
    tensors = {f"{name}.lora_A.weight": torch.randn(4, 8), f"{name}.lora_B.weight": torch.randn(8, 4)}
    config = '{"transformer.r": 4, "transformer.lora_alpha": 6, "transformer.use_rslora": true}'
    save_weights(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": config})
    (layer,) = read_adapter(tmp_path / "a.safetensors").layers.values()
    assert layer.parts[0].scale == pytest.approx(6 / 2)


def test_alpha_pattern_in_the_header(tmp_path: Path) -> None:
    names = [f"transformer.transformer_blocks.{i}.attn.to_out.0" for i in (0, 1)]
    tensors = {f"{n}.lora_A.weight": torch.randn(4, 8) for n in names} | {f"{n}.lora_B.weight": torch.randn(8, 4) for n in names}
    config = '{"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"transformer_blocks.1.attn.to_out.0": 2}}'
    save_weights(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": config})
    layers = read_adapter(tmp_path / "a.safetensors").layers
    assert [layers[f"dit.double_blocks.{i}.img_attn.proj"].parts[0].scale for i in (0, 1)] == [1.0, 0.5]
