"""The one matrix product: adapters in their order, the bias last, and plain layers taken over without a copy."""

import torch
from torch import Tensor, nn

from fluxsmith.models.linear import Linear, adopt_linears


class Times(nn.Module):
    """y -> factor * y + sum of the input: tells order, and that the layer's input arrives."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.factor * y + x.sum(dim=-1, keepdim=True)


class Coarse(Linear):
    """Stands for a quantised layer: only `matmul` and `dequantize` are its own."""

    def matmul(self, x: Tensor) -> Tensor:
        return x @ self.dequantize().T

    def dequantize(self) -> Tensor:
        return self.weight.round()


def layer(kind: type[Linear] = Linear, *, bias: bool = True) -> Linear:
    torch.manual_seed(0)
    return kind(3, 2, bias=bias)


def test_without_adapters_it_is_the_plain_layer() -> None:
    linear = layer()
    x = torch.randn(4, 3)
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
    assert set(linear.state_dict()) == {"weight", "bias"}


def test_adapters_act_in_order_before_the_bias() -> None:
    linear, x = layer(), torch.randn(4, 3)
    linear.adapters["a"], linear.adapters["b"] = Times(2.0), Times(-1.0)
    total = x.sum(dim=-1, keepdim=True)
    expected = -(2 * (x @ linear.weight.T) + total) + total + linear.bias
    torch.testing.assert_close(linear(x), expected)
    del linear.adapters["a"]
    torch.testing.assert_close(linear(x), -(x @ linear.weight.T) + total + linear.bias)
    del linear.adapters["b"]
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))


def test_an_adapter_sits_on_any_base() -> None:
    linear, x = layer(Coarse, bias=False), torch.randn(4, 3)
    linear.adapters["a"] = Times(3.0)
    torch.testing.assert_close(linear(x), 3 * (x @ linear.weight.round().T) + x.sum(dim=-1, keepdim=True))


def test_gradients_reach_the_adapter_through_a_frozen_base() -> None:
    linear = layer()
    linear.requires_grad_(False)
    adapter = linear.adapters["a"] = Times(1.0)
    linear(torch.randn(4, 3)).sum().backward()
    assert adapter.factor.grad is not None
    assert linear.weight.grad is None


def test_adopting_shares_parameters_and_keeps_keys() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2, bias=False)), Linear(2, 2), nn.LayerNorm(2))
    before = {key: value.data_ptr() for key, value in model.state_dict().items()}
    own, output = model[2], model(torch.ones(1, 3))
    adopt_linears(model)
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == before
    assert all(isinstance(module, Linear) for module in model.modules() if isinstance(module, nn.Linear))
    assert model[2] is own, "what is a Linear already stays"
    assert torch.equal(model(torch.ones(1, 3)), output)


def test_a_change_of_the_adopted_weight_is_seen_by_both() -> None:
    plain = nn.Linear(2, 2)
    ours = Linear.adopt(plain)
    with torch.no_grad():
        plain.weight.zero_()
    assert not ours.weight.any()
    assert Linear.adopt(nn.Linear(2, 2, bias=False)).bias is None
