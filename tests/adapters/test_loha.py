"""LoHa's formula and start."""

import pytest
from small_layer import changed, follows_its_delta, layer, random, whole

from fluxsmith.adapters.loha import Config
from fluxsmith.models.flux import FluxDiT


@pytest.mark.ledger("ST-11")
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_formula(strength: float) -> None:
    t = {"w1_a": random(36, 2), "w1_b": random(2, 12), "w2_a": random(36, 2), "w2_b": random(2, 12)}
    base, adapter, x = layer(whole("loha", 3.0, **t), strength)
    wanted = x @ (base.weight + strength * 3 / 2 * (t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"])).T
    assert (changed(base, x) - wanted).abs().max() < 1e-12
    assert follows_its_delta(base, adapter, x)


def test_start(dit: FluxDiT) -> None:
    made = Config(rank=8).build({"dit": dit})
    stds = {name: param.detach().std().item() for name, param in made.params.items() if ".img_mlp.0." in name}
    for name, std in stds.items():
        wanted = {"w1_a": 0.1, "w1_b": 1.0, "w2_a": 0.0, "w2_b": 1.0}[name.rpartition(".")[2]]
        assert std == pytest.approx(wanted, rel=0.15), name
