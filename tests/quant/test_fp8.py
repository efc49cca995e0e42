"""fp8 weights: how far off they are, that rows are scaled, and that adapters and gradients work on them."""

import pytest
import tiny_run
import torch

from fluxsmith.models.linear import Linear
from fluxsmith.quant.base import QuantLinear, quantise_linears
from fluxsmith.quant.fp8 import Fp8Linear


def linear() -> Linear:
    made = Linear(64, 32)
    torch.nn.init.normal_(made.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.weight[3] *= 1e-4  # a row that a plain cast would lose
    return made.requires_grad_(False)


@pytest.mark.ledger("KS-21")
def test_every_row_keeps_three_bits_of_mantissa() -> None:
    base = linear()
    error = (Fp8Linear.of(base).dequantize() - base.weight).abs()
    assert (error / base.weight.abs().clamp(min=base.weight.abs().amax(dim=1, keepdim=True) / 64)).max() <= 2**-4
    plain = Fp8Linear.of(base, rows=False).dequantize()
    assert not plain[3].any()
    assert Fp8Linear.of(base).weight.element_size() == 1


def test_product_and_gradient_are_those_of_the_dequantised_weight() -> None:
    base = linear()
    layer, x = Fp8Linear.of(base), torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.dequantize(), base.bias))
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(dim=0).expand(5, -1))


@pytest.mark.ledger("KS-21")
def test_blocks_are_quantised_and_the_rest_is_not() -> None:
    dit = tiny_run.random_dit()
    for block in dit.blocks:
        quantise_linears(block, Fp8Linear.of)
    kinds = {name: isinstance(module, QuantLinear) for name, module in dit.named_modules() if isinstance(module, Linear)}
    assert {name for name, is_quant in kinds.items() if is_quant} == {name for name in kinds if "_blocks." in name}
