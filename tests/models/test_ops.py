"""The lean steps equal the plain ones, forward and backward, in float64; in bf16 they are nearer to the truth."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny_run
import torch
from streams import tokens
from torch import Tensor, nn

from fluxsmith.adapters.formats.state import lora_part
from fluxsmith.adapters.lora import LoraPart
from fluxsmith.adapters.rows import LayerAdapter
from fluxsmith.models.attention import rotary_table
from fluxsmith.models.fused import GatedAdd, NormRotate, row_scales
from fluxsmith.models.linear import Linear
from fluxsmith.models.ops import LEAN, REFERENCE, plain_heads, use

HEADS, WIDTH = 2, 8
KINDS = (torch.float32, torch.float64)


def draw(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    made = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return made.requires_grad_(grad)


def turning(tokens: int) -> Tensor:
    return rotary_table(torch.arange(float(tokens))[None], WIDTH, 10_000.0)[:, None]


def both(function: Callable[..., Any], other: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of a fixed weighted sum, of one and of the other."""
    results = []
    for run in (function, other):
        out = run(*inputs)
        outs = list(out) if isinstance(out, tuple) else [out]
        total = sum((tensor * torch.arange(tensor.numel(), dtype=tensor.dtype).view(tensor.shape).cos()).sum() for tensor in outs)
        grads = torch.autograd.grad(total, [tensor for tensor in inputs if tensor.requires_grad])
        results.append([*outs, *grads])
    return results[0], results[1]


@pytest.mark.parametrize("batch", [1, 2])
def test_modulation(batch: int) -> None:
    inputs = (draw(batch, 5, 8), draw(batch, 1, 8, seed=1), draw(batch, 1, 8, seed=2))
    one, other = both(LEAN.modulate, REFERENCE.modulate, inputs)
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("trained", [False, True])
def test_gate(trained: bool) -> None:
    one, other = both(LEAN.gate, REFERENCE.gate, (draw(2, 5, 8), draw(2, 1, 8, seed=1, grad=trained), draw(2, 5, 8, seed=2)))
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_constant_gate_saves_nothing() -> None:
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        GatedAdd.apply(draw(1, 2, 4), draw(1, 1, 4, grad=False), draw(1, 2, 4))
    assert packed == []


@pytest.mark.parametrize("rows", [(7,), (3, 4)], ids=["one stream", "text and image"])
def test_heads(rows: tuple[int, ...]) -> None:
    """Norms of both streams, rotation, and v untouched; gradients also of the norms' scales."""
    qkv = draw(2, 7, 3 * HEADS * WIDTH).float().detach().requires_grad_()
    scales = [draw(WIDTH, seed=10 + number).float().detach().requires_grad_() for number in range(2 * len(rows))]

    def run(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda qkv, *own: function(qkv, [(n, own[2 * i], own[2 * i + 1]) for i, n in enumerate(rows)], turning(7), HEADS)

    one, other = both(run(LEAN.heads), run(plain_heads), (qkv, *scales))
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_heads_keep_their_input_and_one_number_a_head() -> None:
    kept: list[Tensor] = []
    qkv = draw(1, 7, 3 * HEADS * WIDTH).float().detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        NormRotate.apply(qkv, row_scales([(7, torch.ones(WIDTH), torch.ones(WIDTH))]), turning(7), HEADS)
    assert sum(tensor.numel() for tensor in kept) == qkv.numel() + 2 * WIDTH + 7 * WIDTH + 7 * 2 * HEADS


def adapted(in_features: int, out_features: int, strength: float = 0.7) -> Linear:
    layer = Linear(in_features, out_features).double().requires_grad_(False)
    nn.init.normal_(layer.weight, std=0.3, generator=torch.Generator().manual_seed(3))
    part = LoraPart(
        lora_part("", 0, out_features, draw(2, in_features, seed=4, grad=False), draw(out_features, 2, seed=5, grad=False), 3.0)
    )
    layer.adapters["lora"] = LayerAdapter([part], out_features).double()
    layer.adapters["lora"].strength.fill_(strength)  # type: ignore[union-attr]
    return layer


CASES = {
    "plain": ((6,), (), ()),
    "two inputs, one before its activation": ((4, 6), (False, True), ()),
    "two outputs": ((6,), (False,), (3, 4)),
    "both": ((2, 4), (True, False), (5, 2)),
}


@pytest.mark.parametrize(("widths", "gelu", "heights"), CASES.values(), ids=CASES)
def test_an_adapted_layer_in_blocks(widths: tuple[int, ...], gelu: tuple[bool, ...], heights: tuple[int, ...]) -> None:
    layer = adapted(sum(widths), 7)
    inputs = [draw(2, 3, width, seed=20 + width) for width in widths]
    factors = list(layer.adapters.parameters())

    def run(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: function(layer, given[: len(inputs)], gelu, heights)

    one, other = both(run(LEAN.linear), run(REFERENCE.linear), (*inputs, *factors))
    assert len(one) == max(1, len(heights)) + len(inputs) + 2
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_against_finite_differences() -> None:
    layer = adapted(6, 5)
    down, up = (param.detach().clone().requires_grad_() for param in layer.adapters.parameters())
    scale = torch.tensor(0.4, dtype=torch.float64)

    def run(x: Tensor, z: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        return layer._adapted((down, up, scale), (x, z), (False, True), (2, 3))

    assert torch.autograd.gradcheck(run, (draw(3, 2), draw(3, 4, seed=7), down, up))


def test_a_frozen_layer_adds_its_products_up() -> None:
    layer = Linear(10, 7).double().requires_grad_(False)
    one, other = both(
        lambda x, z: LEAN.linear(layer, (x, z), (False, True)), lambda x, z: REFERENCE.linear(layer, (x, z), (False, True)),
        (draw(2, 3, 4), draw(2, 3, 6, seed=1)),
    )  # fmt: skip
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs)


@torch.no_grad()
def test_the_whole_model_both_ways() -> None:
    lean, reference = tiny_run.random_dit().requires_grad_(False), tiny_run.random_dit().requires_grad_(False)
    use(reference, REFERENCE)
    torch.testing.assert_close(lean(tokens()), reference(tokens()), rtol=1e-4, atol=1e-5)
    assert reference.double_blocks[0].ops is REFERENCE
    assert lean.double_blocks[0].ops is LEAN


@torch.no_grad()
def test_in_bf16_the_lean_way_is_nearer_to_the_truth() -> None:
    truth = tiny_run.random_dit().requires_grad_(False)(tokens())
    errors = []
    for ops in (LEAN, REFERENCE):
        dit = tiny_run.random_dit().to(torch.bfloat16).requires_grad_(False)
        use(dit, ops)
        given = tokens()._replace(**{name: getattr(tokens(), name).to(torch.bfloat16) for name in ("img", "txt", "y")})
        errors.append((dit(given).float() - truth).norm() / truth.norm())
    assert errors[0] <= errors[1] * 1.05
    assert errors[0] < 0.05


@torch.no_grad()
def test_the_last_block_leaves_text_alone() -> None:
    """Nothing reads it; the prediction is that of a model whose last block goes on with it."""
    dit = tiny_run.random_dit().requires_grad_(False)
    expected = dit(tokens())
    dit.single_blocks[-1].advances_text = True  # type: ignore[assignment]
    torch.testing.assert_close(dit(tokens()), expected, rtol=1e-5, atol=1e-6)
