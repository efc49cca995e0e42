"""fp8 weights: rows are scaled so that no row is lost, and the arithmetic of 8-bit products is that of the card, step by step."""

import pytest
import torch
from quantised import cosine, layer, relative
from torch import Tensor

from fluxsmith.errors import ConfigError
from fluxsmith.io.packed import FP8
from fluxsmith.quant import rows
from fluxsmith.quant.base import plugin
from fluxsmith.quant.fp8 import Config, Fp8Linear


@pytest.mark.ledger("KS-21")
def test_every_row_keeps_three_bits_of_mantissa() -> None:
    base = layer()
    with torch.no_grad():
        base.weight[3] *= 1e-4  # a row that a plain cast would lose
    error = (Fp8Linear.of(base).dequantize() - base.weight).abs()
    assert (error / base.weight.abs().clamp(min=base.weight.abs().amax(dim=1, keepdim=True) / 64)).max() <= 2**-4
    plain = Fp8Linear.of(base, rows=False).dequantize()
    assert not plain[3].any()
    assert Fp8Linear.of(base).weight.element_size() == 1


def by_hand(x: Tensor) -> Tensor:
    """Rounded to e4m3 with a scale a row, and back, in float64."""
    scale = (x.abs().amax(dim=1, keepdim=True) / 448).float().double()
    return (x.double() / scale).float().to(FP8).double() * scale


def test_products_in_fp8_are_those_of_the_card() -> None:
    base = layer()
    config = Config(type="fp8", compute="dynamic")
    made = config.make(base, config.encode(base.weight))
    assert isinstance(made, Fp8Linear)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 64, generator=generator).mul_(torch.logspace(-3, 3, 7)[:, None]).requires_grad_()
    g = torch.randn(7, 48, generator=generator)
    y = made.matmul(x)
    y.backward(g)
    expected = by_hand(x.detach()) @ made.dequantize().double().T
    assert relative(y.double(), expected) < 5e-3  # what bf16 leaves of it
    values = made.weight.view(FP8).double()
    assert x.grad is not None
    assert relative(x.grad.double(), by_hand(g * made.scale.T) @ values) < 5e-3
    assert relative(x.grad, g @ made.dequantize()) > 1e-3  # it is rounded
    assert cosine(x.grad, g @ made.dequantize()) > 0.998


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_when_products_are_in_8_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = plugin(kind)
    assert config.mode() == "never"  # no card here
    assert "activations' type" in config.require(torch.device("cpu"))
    config = config.model_copy(update={"compute": "dynamic"})
    assert config.mode() == "always"
    assert f"multiplied in {kind}" in config.require(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    with pytest.raises(ConfigError, match="weight_only"):
        config.require(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert plugin(kind).mode() == "card"
    assert f"multiplied in {kind}" in plugin(kind).require(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert plugin(kind).mode() == ("card" if kind == "fp8" else "never")
    assert not rows.goes_dynamic("card", torch.zeros(2, 64), 48)  # the tensor is not on the card
