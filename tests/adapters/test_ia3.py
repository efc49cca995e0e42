"""(IA)3 on outputs and on inputs."""

import pytest
import torch
from small_layer import changed, follows_its_delta, layer, random, whole

from fluxsmith.adapters.ia3 import Config
from fluxsmith.models.flux import FluxDiT


@pytest.mark.ledger("ST-11")
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("on_input", [False, True])
def test_formula(on_input: bool, strength: float) -> None:
    weight = random(12 if on_input else 36)
    base, adapter, x = layer(whole("ia3", weight=weight, on_input=torch.tensor(int(on_input))), strength)
    factor = 1 + strength * weight
    assert (changed(base, x) - x @ (base.weight * (factor if on_input else factor[:, None])).T).abs().max() < 1e-12
    assert follows_its_delta(base, adapter, x)


def test_sizes(dit: FluxDiT) -> None:
    made = Config(on_input=True, targets="mlp").build({"dit": dit})
    assert made.params["dit.double_blocks.0.img_mlp.2.weight"].shape == (256,)
    assert made.state().layers["dit.double_blocks.0.img_mlp.2"].parts[0].tensors["on_input"].item() == 1
