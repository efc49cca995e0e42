"""GLoRA's formula."""

import pytest
from small_layer import changed, follows_its_delta, layer, random, whole


@pytest.mark.ledger("ST-11")
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_formula(strength: float) -> None:
    t = {"a1": random(12, 2), "a2": random(2, 12), "b1": random(36, 2), "b2": random(2, 12)}
    base, adapter, x = layer(whole("glora", 3.0, **t), strength)
    change = base.weight @ t["a1"] @ t["a2"] + t["b1"] @ t["b2"]
    assert (changed(base, x) - x @ (base.weight + strength * 1.5 * change).T).abs().max() < 1e-12
    assert follows_its_delta(base, adapter, x)
