"""Broken adapters of every kind are refused with the layer's name; what belongs together is put together."""

import pytest
import torch
from torch import Tensor

from fluxsmith.adapters.formats import kohya, lycoris, peft
from fluxsmith.errors import ModelFileError

NAME = "lora_unet_double_blocks_0_img_attn_qkv"
LOKR = {"lokr_w1": (3, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)}


def file(shapes: dict[str, tuple[int, ...]], name: str = NAME) -> dict[str, Tensor]:
    return {f"{name}.{ending}": torch.ones(shape) for ending, shape in shapes.items()}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"lokr_w1": (3, 3), "lokr_w2_a": (4, 2)}, f"{NAME} has no w2 factor|{NAME} has no w2_b factor"),
        ({"lokr_w1": (3, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (3, 4)}, "do not fit together"),
        ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 2), "hada_w2_b": (2, 5)}, "products are"),
        ({"a1.weight": (4, 2), "a2.weight": (2, 5), "b1.weight": (4, 2), "b2.weight": (2, 4)}, "products are"),
        ({**LOKR, "lora_down.weight": (2, 4)}, "mixes lokr and lora"),
        ({**LOKR, "lokr_t2": (2, 2, 1, 1)}, "factors of a convolution"),
        ({"alpha": ()}, "has no factors"),
        ({"oft_blocks": (3, 4, 5)}, "blocks of 4 x 5"),
        ({"diff": (4, 4), "dora_scale": (4, 1)}, "magnitude .DoRA. over full"),
        ({"lora_down.weight": (2, 4), "lora_up.weight": (4, 2), "rescale": (4, 1)}, "do not belong together: .*rescale"),
        ({"weight": (4,)}, "no part of a LoRA or the like"),
    ],
)
def test_broken_layers(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        kohya.read(file(shapes), {})


def test_numbered_rotations_must_be_complete() -> None:
    name = "oft_unet_double_blocks_0_img_attn_qkv"
    with pytest.raises(ModelFileError, match="blocks 0, 2, some are missing"):
        kohya.read(file({"oft_blocks.0": (2, 4, 4), "oft_blocks.2": (2, 4, 4)}, name), {})
    with pytest.raises(ModelFileError, match="2 sets of blocks, 3 were expected"):
        kohya.read(file({"oft_blocks.0": (2, 4, 4), "oft_blocks.1": (2, 4, 4)}, name), {})
    (layer,) = kohya.read(file({f"oft_blocks.{i}": (2, 4, 4) for i in range(3)}, name), {}).layers.values()
    assert [(part.name, part.start, part.stop, part.alpha) for part in layer.parts] == [
        ("q", 0, 8, 0.001),
        ("k", 8, 16, 0.001),
        ("v", 16, 24, 0.001),
    ]


def test_one_file_may_mix_kinds() -> None:
    tensors = file(LOKR) | file({"diff": (4, 4)}, "lora_unet_double_blocks_0_img_attn_proj")
    tensors |= file({"lora_down.weight": (2, 4), "lora_up.weight": (4, 2)}, "lora_unet_single_blocks_0_linear2")
    state = kohya.read(tensors, {})
    assert [layer.kind for layer in state.layers.values()] == ["lokr", "full", "lora"]
    assert state.kinds() == ("lokr", "full", "lora")


def test_kinds_may_differ_between_the_parts_of_a_layer() -> None:
    q, k = (f"lycoris_transformer_blocks_0_attn_to_{x}" for x in "qk")
    state = lycoris.read(file(LOKR, q) | file({"lora_down.weight": (2, 12), "lora_up.weight": (12, 2)}, k), {})
    (layer,) = state.layers.values()
    assert layer.kind == "lokr+lora"
    assert [(part.start, part.stop) for part in layer.parts] == [(0, 12), (12, 24)]


def test_a_scalar_is_part_of_the_strength() -> None:
    tensors = file({"lora_down.weight": (2, 4), "lora_up.weight": (4, 2)}, "lora_unet_double_blocks_0_img_attn_proj")
    tensors["lora_unet_double_blocks_0_img_attn_proj.scalar"] = torch.tensor(0.5)
    (layer,) = kohya.read(tensors, {}).layers.values()
    assert layer.parts[0].scale == 0.5


def test_whole_kronecker_factors_have_no_strength() -> None:
    tensors = file({"lokr_w1": (3, 3), "lokr_w2": (4, 4)}) | {f"{NAME}.alpha": torch.tensor(1e4)}
    (layer,) = kohya.read(tensors, {}).layers.values()
    assert (layer.parts[0].rank, layer.parts[0].scale, layer.parts[0].alpha) == (0, 1.0, 1e4)


def test_which_rule_a_dora_follows() -> None:
    shapes = {"lora_down.weight": (2, 4), "lora_up.weight": (4, 2), "dora_scale": (4, 1)}
    (layer,) = kohya.read(file(shapes, "lora_unet_double_blocks_0_img_attn_proj"), {}).layers.values()
    assert (layer.kind, layer.parts[0].rule) == ("dora", "lycoris")
    name = "transformer.transformer_blocks.0.attn.to_out.0"
    (layer,) = peft.read(file({"lora_A.weight": (2, 4), "lora_B.weight": (4, 2), "lora_magnitude_vector": (4,)}, name), {}).layers.values()
    assert layer.parts[0].rule == "peft"
    assert layer.parts[0].tensors["magnitude"].shape == (4, 1)
