"""sd-scripts' OFT: the formula with its constraint, separate rotations for q, k, v and mlp, and the merge that sd-scripts lacks."""

import pytest
import torch
from safetensors.torch import load_file
from small_layer import changed, follows_its_delta, layer, random, whole
from torch import Tensor

from fluxsmith.adapters.formats.files import write_adapter
from fluxsmith.adapters.load import load_adapter
from fluxsmith.adapters.oft import Config
from fluxsmith.errors import ConfigError
from fluxsmith.models.flux import FluxDiT

ATTENTION = r"double_blocks\.\d+\.(img|txt)_attn"


def rotation(block: Tensor, norm: Tensor, limit: float) -> Tensor:
    skewed = (block - block.T) * ((norm.clamp(max=limit) + 1e-8) / (norm + 1e-8))
    eye = torch.eye(len(block), dtype=torch.float64)
    return (eye + skewed) @ torch.linalg.inv(eye - skewed)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("constraint", [0.01, 100.0])
def test_formula(constraint: float, strength: float) -> None:
    blocks = random(4, 9, 9)
    base, adapter, x = layer(whole("oft", constraint, blocks=blocks), strength)
    norm = (blocks - blocks.transpose(1, 2)).norm()
    eye = torch.eye(9, dtype=torch.float64)
    turned = []
    for number, block in enumerate(blocks):
        r = strength * (rotation(block, norm, constraint * 36) - eye) + eye
        turned.append(r.T @ base.weight[number * 9 : number * 9 + 9])
    assert (changed(base, x) - x @ torch.cat(turned).T).abs().max() < 1e-4  # rotations are made in float32
    assert follows_its_delta(base, adapter, x)


def test_a_rotation_keeps_lengths() -> None:
    base, _, x = layer(whole("oft", 100.0, blocks=random(4, 9, 9)))
    assert torch.allclose(changed(base, x).norm(dim=-1), (x @ base.weight.T).norm(dim=-1), rtol=1e-4)


def test_targets_and_names(dit: FluxDiT, tmp_path) -> None:
    """Attention of the double blocks as without enable_all_linear, all linear layers as with it; numbers count the parts."""
    made = Config(rank=4, targets=ATTENTION).build({"dit": dit})
    assert len(made.adapters) == 2 * 4
    made.detach()
    made = Config(rank=4, constraint=0.02).build({"dit": dit})
    write_adapter(tmp_path / "a.safetensors", made.state(), dtype=None)
    tensors = load_file(tmp_path / "a.safetensors")
    assert {name for name in tensors if "single_blocks_0_linear1" in name} == {
        *(f"oft_unet_single_blocks_0_linear1.oft_blocks.{i}" for i in range(4)),
        "oft_unet_single_blocks_0_linear1.alpha",
    }
    assert tensors["oft_unet_single_blocks_0_linear1.oft_blocks.3"].shape == (4, 64, 64)
    assert tensors["oft_unet_double_blocks_0_img_attn_qkv.alpha"].item() == pytest.approx(0.02)
    made.detach()
    assert len(load_adapter(tmp_path / "a.safetensors", {"dit": dit}).adapters) == 2 * 10 + 3 * 3


def test_blocks_must_divide(dit: FluxDiT) -> None:
    with pytest.raises(ConfigError, match="5 blocks do not divide the 64 rows of dit.double_blocks.0.img_attn.qkv:q"):
        Config(rank=5, targets=ATTENTION).build({"dit": dit})
    with pytest.raises(ValueError, match="constraint instead of alpha"):
        Config(alpha=1)
