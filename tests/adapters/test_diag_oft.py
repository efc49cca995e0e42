"""LyCORIS' Diag-OFT and BOFT: formulas, constraint, rescaling, blocks."""

import pytest
import torch
from small_layer import changed, follows_its_delta, layer, random, whole

from fluxsmith.adapters import boft
from fluxsmith.adapters.boft import butterfly
from fluxsmith.adapters.diag_oft import Config
from fluxsmith.errors import ConfigError
from fluxsmith.models.flux import FluxDiT


@pytest.mark.ledger("ST-11")
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("constraint", [0.0, 0.01])
def test_diag_oft_formula(constraint: float, strength: float) -> None:
    blocks, rescale = random(6, 6, 6), random(36, 1)
    base, adapter, x = layer(whole("diag_oft", constraint, blocks=blocks, rescale=rescale), strength)
    skewed = blocks - blocks.transpose(1, 2)
    norm = skewed.norm() + 1e-8
    if 0 < constraint * 36 < norm:
        skewed = skewed * constraint * 36 / norm
    eye = torch.eye(6, dtype=torch.float64)
    turned = [
        (strength * ((eye + q) @ torch.linalg.inv(eye - q) - eye) + eye).T @ base.weight[i * 6 : i * 6 + 6] for i, q in enumerate(skewed)
    ]
    assert (changed(base, x) - x @ (rescale * torch.cat(turned)).T).abs().max() < 1e-4
    assert follows_its_delta(base, adapter, x)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_boft_follows_its_delta_and_is_a_rotation(strength: float) -> None:
    base, adapter, x = layer(whole("boft", 0.0, blocks=random(2, 18, 2, 2)), strength)
    assert follows_its_delta(base, adapter, x)
    if strength == 1:
        assert torch.allclose(changed(base, x).norm(dim=-1), (x @ base.weight.T).norm(dim=-1), rtol=1e-4)


def test_boft_stages_reach_across_blocks() -> None:
    """The second stage mixes rows of different blocks of the first."""
    _, adapter, _ = layer(whole("boft", 0.0, blocks=random(2, 6, 6, 6)))
    weight = torch.zeros(36, 12, dtype=torch.float64)
    weight[0] = 1
    assert (adapter.delta(weight).abs() > 1e-9).any(dim=1).nonzero().flatten().tolist() == list(range(12))


@pytest.mark.parametrize(("rows", "limit", "sides"), [(3072, 8, (6, 512)), (12288, 32, (24, 512)), (64, 8, (8, 8)), (9216, 100, (72, 128))])
def test_butterfly_blocks(rows: int, limit: int, sides: tuple[int, int]) -> None:
    assert butterfly(rows, limit, "x") == sides


def test_a_butterfly_that_cannot_be(dit: FluxDiT) -> None:
    with pytest.raises(ConfigError, match="the 384 rows of .* do not split into even blocks of up to 4"):
        boft.Config(rank=4).build({"dit": dit})


def test_start_and_sizes(dit: FluxDiT) -> None:
    made = Config(rank=8, rescale=True, constraint=0.5, targets="attention").build({"dit": dit})
    qkv = made.adapters["dit.double_blocks.0.img_attn.qkv"].tensors()
    assert {name: tuple(param.shape) for name, param in qkv.items()} == {"blocks": (24, 8, 8), "rescale": (192, 1)}
    assert made.state().layers["dit.double_blocks.0.img_attn.qkv"].parts[0].alpha == 0.5
