"""Full differences, of the bias too."""

import pytest
import torch
from small_layer import follows_its_delta, layer, random, whole

from fluxsmith.adapters.base import AdapterSet
from fluxsmith.adapters.full import Config
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.linear import Linear


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_formula(strength: float) -> None:
    diff, bias = random(36, 12), random(36)
    base, adapter, x = layer(whole("full", diff=diff, bias=bias), strength)
    wanted = x @ (base.weight + strength * diff).T + base.bias + strength * bias
    assert (base(x) - wanted).abs().max() < 1e-12
    assert follows_its_delta(base, adapter, x)


def test_parts_of_a_layer_have_their_own_bias() -> None:
    q = whole("full", diff=random(12, 12), bias=random(12)).having(name="q", start=0, stop=12)
    v = whole("full", diff=random(12, 12)).having(name="v", start=24, stop=36)
    base, adapter, x = layer([q, v])
    assert follows_its_delta(base, adapter, x)
    assert torch.equal(base(x)[..., 12:24], (x @ base.weight.T + base.bias)[..., 12:24])


def test_bias_is_an_option(dit: FluxDiT) -> None:
    for bias in (True, False):
        made = Config(bias=bias, targets="blocks").build({"dit": dit})
        assert any(name.endswith(".bias") for name in made.params) is bias
        made.detach()


def test_merging_gives_a_layer_without_bias_one() -> None:
    base = Linear(12, 36, bias=False)
    _, adapter, _ = layer(whole("full", diff=torch.zeros(36, 12), bias=torch.ones(36)), 0.5)
    made = AdapterSet({"dit.x": base}, {"dit.x": adapter})
    made.attach()
    made.merge()
    assert base.bias.tolist() == [0.5] * 36


def test_alpha_has_no_place() -> None:
    with pytest.raises(ValueError, match="has no alpha"):
        Config(alpha=4)
