"""A LoRA on a quantised base is one step of autograd: the same results, fewer kernels, less kept, and unpacked no oftener than needed."""

import weakref
from typing import Any

import pytest
import torch
from counted import Counters, kept
from quantised import BASES, EXACT, Lora, adapted, config_of, cosine, gradients, layer, normal_dit, relative
from streams import tokens
from torch import Tensor

from fluxsmith.io import packed
from fluxsmith.memory.checkpoint import checkpoint_blocks
from fluxsmith.models.flux import FluxDiT
from fluxsmith.quant import groups, nf4, rows
from fluxsmith.quant.base import QuantLinear, quantise

FORMS: dict[str, tuple[tuple[int, ...], tuple[bool, ...], tuple[int, ...]]] = {  # input widths, which lack their GELU, output heights
    "whole": ((64,), (False,), ()),
    "columns": ((16, 48), (False, True), ()),
    "rows": ((64,), (False,), (32, 16)),
}


def made(name: str) -> QuantLinear:
    base, config = layer(), config_of(name)
    one = config.make(base, config.encode(base.weight))
    one.adapters["a"] = Lora()
    return one


def run(one: QuantLinear, form: str) -> list[Tensor]:
    """Outputs, then gradients of inputs and factors."""
    widths, gelu, heights = FORMS[form]
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(2, 20, width, generator=generator).requires_grad_() for width in widths]
    outputs = one.blocks(inputs, gelu, heights)
    sum((y * torch.randn(y.shape, generator=generator)).sum() for y in outputs).backward()
    factors = one.adapters["a"]
    return [y.detach() for y in outputs] + [x.grad for x in (*inputs, factors.down, factors.up) if x.grad is not None]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BASES)
def test_results_are_those_of_the_steps(name: str, form: str) -> None:
    lean, steps = made(name), made(name)
    steps.is_lean = False
    assert lean.factors() is not None
    assert steps.factors() is None
    mine, theirs = run(lean, form), run(steps, form)
    assert len(mine) == len(theirs) == len(FORMS[form][0]) + max(1, len(FORMS[form][2])) + 2
    for one, other in zip(mine, theirs, strict=True):
        if name in EXACT:
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
        else:  # scales of a row are those of its part, so roundings differ
            assert relative(one, other) < 0.03


@pytest.mark.ledger("FS-08")
@pytest.mark.parametrize("form", ["whole", "columns"])
@pytest.mark.parametrize("name", BASES)
def test_less_is_done_and_less_is_kept(name: str, form: str) -> None:
    widths, gelu, _ = FORMS[form]
    found = {}
    for is_lean in (True, False):
        one = made(name)
        one.is_lean = is_lean
        inputs = [torch.randn(2, 20, width).requires_grad_() for width in widths]
        own = [*one.parameters(), *one.buffers(), *inputs]
        with Counters() as counters:
            y, size = kept(lambda one=one, inputs=inputs: one.blocks(inputs, gelu)[0], own)
            y.sum().backward()
        found[is_lean] = (counters.kernels if form == "whole" else counters.bytes, size)
    (lean, size), (steps, theirs) = found[True], found[False]
    assert lean < steps or name == "fp8-dynamic"  # which plain PyTorch makes up for, away from a card
    assert size <= 2 * 20 * 4 * 4 + 4, "x A^T, and the strength"
    assert size < theirs or form == "whole"


class Unpackings:
    """Every weight that is unpacked, and how many of them are there at once."""

    def __init__(self) -> None:
        self.count = self.most = 0
        self.alive: list[weakref.ref[Tensor]] = []

    def watch(self, unpack: Any) -> Any:
        def watched(*args: Any) -> Tensor:
            weight = unpack(*args)
            self.count += 1
            self.alive = [one for one in self.alive if one() is not None] + [weakref.ref(weight)]
            self.most = max(self.most, len(self.alive))
            return weight

        return watched


@pytest.fixture
def unpackings(monkeypatch: pytest.MonkeyPatch) -> Unpackings:
    watching = Unpackings()
    monkeypatch.setattr(groups, "from_groups", watching.watch(packed.from_groups))
    monkeypatch.setattr(nf4, "from_nf4", watching.watch(packed.from_nf4))
    return watching


LAYERS = {"double": 8, "single": 2}  # of a block, modulation (8 bits) left out


def quantised(name: str) -> tuple[FluxDiT, Any]:
    dit = normal_dit()
    quantise(config_of(name), "dit", dit)
    return dit, adapted(dit, targets="blocks")


@pytest.mark.ledger("FS-08")
@pytest.mark.parametrize("name", ["int4", "int2", "nf4"])
def test_4_bits_are_unpacked_once_for_recomputation_and_gradient(name: str, unpackings: Unpackings) -> None:
    dit, adapters = quantised(name)
    plain = [grad.clone() for grad in gradients(dit, adapters)]
    total = sum(LAYERS.values())
    both = 3 * total - 3  # `gradients` looks at the shape first; what needs no gradient of its input is not unpacked for one
    assert both - 3 <= unpackings.count <= 3 * total
    for param in adapters.params.values():
        param.grad = None
    checkpoint_blocks(dit)
    target = torch.randn(dit(tokens(0)).shape, generator=torch.Generator().manual_seed(3))
    unpackings.count = unpackings.most = 0
    output = dit(tokens(0))
    assert unpackings.count == total
    assert unpackings.most <= 2, "none is kept after its product"
    (output - target).square().mean().backward()
    assert unpackings.count == 2 * total, "once more, for the recomputation and the gradient together"
    assert unpackings.most <= LAYERS["double"] + 1, "none outlives the block it is in"
    assert not [one for one in unpackings.alive if one() is not None]
    for one, param in zip(plain, adapters.params.values(), strict=True):
        assert torch.equal(one, param.grad), "the same bits"


def test_8_bit_products_of_the_card_are_the_twins_of_torch() -> None:
    """Where torch multiplies e4m3 on the CPU, its result is that of the plain form up to bf16."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, 64, generator=generator).to(packed.FP8) for size in (40, 48))
    scale_a, scale_b = torch.rand(40, 1, generator=generator), torch.rand(1, 48, generator=generator)
    torch.testing.assert_close(
        rows.product_fp8(a, b, scale_a, scale_b), torch._scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=torch.bfloat16)
    )


@pytest.mark.ledger("FS-08")
@pytest.mark.ledger("DS-31")
@pytest.mark.parametrize("name", ["fp8-dynamic", "int8-dynamic"])
def test_forward_and_gradient_are_multiplied_in_8_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, same = made(name), made(name)
    same.mode = "never"
    seen: list[tuple[torch.dtype, ...]] = []
    plain = {"fp8-dynamic": "product_fp8", "int8-dynamic": "product_int8"}[name]
    product = getattr(rows, plain)

    def watched(a: Tensor, b: Tensor, *scales: Tensor) -> Tensor:
        seen.append((a.dtype, b.dtype))
        return product(a, b, *scales)

    monkeypatch.setattr(rows, plain, watched)
    mine = run(one, "rows")
    eight = torch.int8 if "int8" in name else packed.FP8
    assert seen == [(eight, eight)] * 4, "two blocks of rows, in both directions"
    theirs = run(same, "rows")
    for left, right in zip(mine, theirs, strict=True):
        assert cosine(left, right) > 0.998
    assert not torch.equal(mine[2], theirs[2])
