"""LoKr: the Kronecker product without the matrix, how layers are factored, where factors start."""

import pytest
import torch
from small_layer import changed, follows_its_delta, layer, random, whole

from fluxsmith.adapters.lokr import Config, factorization
from fluxsmith.adapters.rows import part_modules
from fluxsmith.errors import ConfigError
from fluxsmith.models.flux import FluxDiT

QKV = "dit.double_blocks.0.img_attn.qkv"


@pytest.mark.ledger("ST-11")
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(
    ("shapes", "scale"),
    [
        ({"w1": (6, 3), "w2_a": (6, 2), "w2_b": (2, 4)}, 3 / 2),
        ({"w1_a": (6, 2), "w1_b": (2, 3), "w2_a": (6, 2), "w2_b": (2, 4)}, 3 / 2),
        ({"w1_a": (6, 2), "w1_b": (2, 3), "w2": (6, 4)}, 3 / 2),
        ({"w1": (6, 3), "w2": (6, 4)}, 1.0),  # alpha has no effect
    ],
)
def test_formula(shapes: dict[str, tuple[int, int]], scale: float, strength: float) -> None:
    tensors = {name: random(*shape) for name, shape in shapes.items()}
    base, adapter, x = layer(whole("lokr", 3.0, **tensors), strength)
    left = tensors["w1"] if "w1" in tensors else tensors["w1_a"] @ tensors["w1_b"]
    right = tensors["w2"] if "w2" in tensors else tensors["w2_a"] @ tensors["w2_b"]
    wanted = x @ (base.weight + strength * scale * torch.kron(left, right)).T
    assert (changed(base, x) - wanted).abs().max() < 1e-12
    assert follows_its_delta(base, adapter, x)


@pytest.mark.parametrize(
    ("size", "factor", "sides"),
    [
        (3072, -1, (48, 64)), (9216, -1, (96, 96)), (12288, -1, (96, 128)), (21504, -1, (128, 168)), (127, -1, (1, 127)),
        (3072, 16, (16, 192)), (3072, 10, (8, 384)), (250, 8, (5, 50)), (250, 50, (5, 50)), (360, 4, (4, 90)),
    ],
)  # fmt: skip
def test_factorization(size: int, factor: int, sides: tuple[int, int]) -> None:
    assert factorization(size, factor) == sides


def test_shapes_follow_the_options(dit: FluxDiT) -> None:
    """192 x 64 is (12 x 16) x (8 x 8)."""
    found = {}
    for name, options in {
        "plain": {"rank": 4},
        "both": {"rank": 4, "decompose_both": True},
        "wide": {"rank": 8},
        "full": {"rank": 4, "full_matrix": True},
        "factor": {"rank": 4, "factor": 4},
        "unbalanced": {"rank": 2, "unbalanced": True},
    }.items():
        made = Config(targets=r"double_blocks\.0\.img_attn\.qkv", **options).build({"dit": dit})
        found[name] = {short: tuple(param.shape) for short, param in made.adapters[QKV].tensors().items()}
        made.detach()
    assert found["plain"] == {"w1": (12, 8), "w2_a": (16, 4), "w2_b": (4, 8)}
    assert found["both"] == {"w1_a": (12, 4), "w1_b": (4, 8), "w2_a": (16, 4), "w2_b": (4, 8)}
    assert found["wide"] == {"w1": (12, 8), "w2": (16, 8)}  # no rank below half of the larger side
    assert found["full"] == {"w1": (12, 8), "w2": (16, 8)}
    assert found["factor"] == {"w1": (4, 4), "w2_a": (48, 4), "w2_b": (4, 16)}
    assert found["unbalanced"] == {"w1": (16, 8), "w2_a": (12, 2), "w2_b": (2, 8)}


def test_strength_and_start(dit: FluxDiT) -> None:
    made = Config(rank=4, alpha=2, rslora=True, targets=r"img_attn\.qkv").build({"dit": dit})
    assert {part.alpha for part in part_modules(made)} == {4.0}  # alpha / rank of the file is alpha / sqrt(rank)
    for name, param in made.params.items():
        assert bool(param.any()) is not name.endswith("w2_b")


def test_weight_decompose(dit: FluxDiT) -> None:
    made = Config(rank=4, weight_decompose=True, norm_per="input", targets="attention").build({"dit": dit})
    weight = made.bases[QKV].weight
    assert torch.allclose(made.params[f"{QKV}.magnitude"], weight.norm(dim=0, keepdim=True))
    assert made.state().layers[QKV].kind == "dora"


def test_impossible_options() -> None:
    with pytest.raises(ValueError, match="factor is -1 or a positive number"):
        Config(factor=0)
    with pytest.raises(ValueError, match="leaves no factor for decompose_both"):
        Config(full_matrix=True, decompose_both=True)


def test_a_file_of_another_kind_is_refused_with_its_name(dit: FluxDiT, fixtures_root) -> None:
    path = fixtures_root / "flux-dev-lora-tiny/lycoris_loha.safetensors"
    with pytest.raises(ConfigError, match=r"lycoris_loha\.safetensors: it is a loha.*adapter\.type = \"loha\""):
        Config(type="lokr", init_from=path, rank_from_file=True).build({"dit": dit})
