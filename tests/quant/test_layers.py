"""Each kind of quantised layer: what its product and gradient are, in every type; what it keeps; compiled; files' tensors."""

import pytest
import torch
from counted import kept
from quantised import BASES, EXACT, Lora, config_of, cosine, layer, relative
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fluxsmith.io import packed
from fluxsmith.quant.base import QuantLinear

ERRORS = {"fp8": 0.028, "int8": 0.008, "int4": 0.11, "int2": 0.37, "nf4": 0.10}  # of normally distributed weights, relative L2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def made(name: str, out_features: int = 48, in_features: int = 64) -> QuantLinear:
    base, config = layer(out_features, in_features), config_of(name)
    return config.make(base, config.encode(base.weight))


def given(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


@pytest.mark.ledger("ST-05")
@pytest.mark.parametrize("name", BASES)
def test_the_weight_is_near_the_original(name: str) -> None:
    one = made(name)
    assert 0 < relative(one.dequantize(), layer().weight) < ERRORS[BASES[name][0]]
    assert one.dequantize().dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXACT)
def test_product_and_gradient_are_those_of_the_dequantised_weight(name: str, dtype: str) -> None:
    one, x = made(name), given(DTYPES[dtype])
    one.bias.data = one.bias.to(x.dtype)
    y = one(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    y.backward(grad.to(y.dtype))
    assert (y.dtype, x.grad.dtype) == (x.dtype, x.dtype)
    weight = one.dequantize()
    assert relative(y.float() - one.bias.float(), x.detach().float() @ weight.T) < ROUNDING[x.dtype]
    assert relative(x.grad.float(), grad @ weight) < ROUNDING[x.dtype]


@pytest.mark.parametrize("name", ["fp8-dynamic", "int8-dynamic"])
def test_dynamic_products_are_near(name: str) -> None:
    one, x = made(name), given()
    y = one.matmul(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    y.backward(grad)
    assert 1e-3 < relative(y, x.detach() @ one.dequantize().T) < 0.04
    assert x.grad is not None
    assert cosine(x.grad, grad @ one.dequantize()) > 0.998


def test_products_in_int8_are_exact_sums_of_what_was_rounded() -> None:
    one, x = made("int8-dynamic"), given()
    grad = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(3))
    y = one.matmul(x)
    y.backward(grad)

    def rounded(value: Tensor) -> Tensor:
        scale = value.abs().amax(dim=-1, keepdim=True) / 127
        return (value / scale).round().double() * scale.double()

    torch.testing.assert_close(y.double(), rounded(x.detach()) @ one.dequantize().double().T, atol=1e-6, rtol=1e-5)
    assert isinstance(one.scale, Tensor)
    expected = rounded(grad * one.scale.T) @ one.weight.double()
    torch.testing.assert_close(x.grad.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", BASES)
def test_autocast_decides_the_type(name: str) -> None:
    one, x = made(name), given()
    with torch.autocast("cpu", torch.bfloat16):
        y = one(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert cosine(x.grad[0, 0], one.dequantize().sum(dim=0)) > 0.99


@pytest.mark.ledger("ST-42")
@pytest.mark.parametrize("name", BASES)
def test_it_compiles_whole(name: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    one, x, again = made(name), given(), given()
    compiled = torch.compile(one, backend=counter, fullgraph=True, dynamic=False)
    compiled(x).square().sum().backward()
    one(again).square().sum().backward()
    torch._dynamo.reset()
    assert counter.frame_count == 1
    torch.testing.assert_close(x.grad, again.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.ledger("ST-42")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize(("name", "has_lora"), [("fp8-dynamic", True), ("int4", False), ("nf4-kernel", True)])
def test_a_compiler_does_not_keep_the_weight_unpacked(name: str, has_lora: bool) -> None:
    """Left alone, a partitioner sees that both passes unpack the same weight, and keeps it from one to the other."""
    torch._dynamo.reset()
    one, x, again = made(name, 64), given(), given()
    if has_lora:
        one.adapters["a"] = Lora(64)
    compiled = torch.compile(one, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)
    y, size = kept(lambda: compiled(x), [*one.parameters(), *one.buffers(), x])
    torch._dynamo.reset()
    assert size < 1000 < one.weight.numel(), "x A^T, scales, and small change"
    y.sum().backward()
    one(again).sum().backward()
    torch.testing.assert_close(x.grad, again.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", BASES)
def test_only_few_bits_are_kept_for_the_backward_pass(name: str) -> None:
    one, x, kept = made(name, 256), given(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        one(x)
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) <= one.stored_bytes() + x.numel() * 4


@pytest.mark.parametrize("name", BASES)
def test_the_stored_tensors_make_the_layer_again(name: str) -> None:
    one, config = made(name), config_of(name)
    again = config.make(layer(), config.fitting(one.parts()))
    assert torch.equal(one.dequantize(), again.dequantize())
    form = {"fp8": "scaled", "int8": "scaled"}.get(one.form, one.form)
    torch.testing.assert_close(packed.stood_for(form, one.parts()), one.dequantize(), atol=0, rtol=0)


@pytest.mark.parametrize(("name", "expected"), [("fp8", 1.0013), ("int8", 1.0013), ("int4", 0.53125), ("int2", 0.3125), ("nf4", 0.5159)])
def test_bytes_per_weight(name: str, expected: float) -> None:
    one = made(name, 64, 3072)
    assert one.bytes_per_weight() == pytest.approx(expected, abs=1e-4)
    assert one.stored_bytes() == config_of(name).bytes(3072, 64)  # what the planner counts on


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_are_packed_and_unpacked(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(packed.unpack(packed.pack(codes, bits), bits), codes)
    assert packed.pack(codes, bits).shape == (3, 16 * bits // 8)


def test_nf4_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = layer(64, 256).weight
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    parts = packed.nf4(weight)
    largest = packed.nf4_absmax(parts["absmax"], parts["nested"], parts["offset"])
    torch.testing.assert_close(largest, state.absmax, atol=0, rtol=5e-3)  # double quantisation
    assert (parts[""].flatten() == codes.flatten()).float().mean() > 0.98
    single = packed.from_nf4(codes.view(64, -1), state.absmax, torch.float32)
    torch.testing.assert_close(single, functional.dequantize_4bit(codes, state), atol=1e-7, rtol=0)
    double, nested = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours, theirs = (relative(one, weight) for one in (packed.stood_for("nf4", parts), functional.dequantize_4bit(double, nested)))
    assert ours == pytest.approx(theirs, rel=0.01)


def test_groups_are_searched_for_the_best_range() -> None:
    weight = layer(64, 256).weight
    for bits, plain in ((4, 0.115), (2, 0.5)):
        assert relative(packed.stood_for(f"int{bits}", packed.grouped(weight, bits, 128)), weight) < plain * 0.9
