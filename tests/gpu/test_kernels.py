"""The Triton kernels on a card, at FLUX's sizes: right, lean in memory, compiled whole, and not slower than what they replace.

`pytest tests/gpu/test_kernels.py -s` prints the times; `memory.kernels = "auto"` may choose the kernels where they win.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_dit import dit, tokens
from torch import Tensor

from fluxsmith.models.attention import rotary_table
from fluxsmith.models.ops import LEAN, REFERENCE, Ops, use

triton = pytest.importorskip("triton")

from fluxsmith.models.kernels.table import TRITON  # noqa: E402

pytestmark = pytest.mark.gpu
ROWS, HEADS, WIDTH = 4608, 24, 128  # 1024 x 1024 pixels and 512 text tokens


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").bfloat16()


def modulate_case(batch: int, *, trained: bool) -> Callable[[Ops], Callable[[], Any]]:
    x, shift, scale = draw(batch, ROWS, HEADS * WIDTH), draw(batch, 1, HEADS * WIDTH, seed=1), draw(batch, 1, HEADS * WIDTH, seed=2)
    inputs = [tensor.requires_grad_() for tensor in ((x, shift, scale) if trained else (x,))]
    return lambda ops: lambda: step(ops.modulate(x, shift, scale), inputs)


def heads_case(batch: int, *, trained: bool) -> Callable[[Ops], Callable[[], Any]]:
    qkv, scales = draw(batch, ROWS, 3 * HEADS * WIDTH).requires_grad_(), [draw(WIDTH, seed=seed) for seed in (1, 2)]
    pe = rotary_table(torch.arange(float(ROWS), device="cuda")[None], WIDTH, 10_000.0)[:, None]
    inputs = [qkv, *(scale.requires_grad_() for scale in scales)] if trained else [qkv]
    return lambda ops: lambda: step(ops.heads(qkv, [(ROWS, scales[0], scales[1])], pe, HEADS), inputs)


def step(out: Tensor | tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    outs = [out] if isinstance(out, Tensor) else list(out)
    return [*outs, *torch.autograd.grad(outs, inputs, [tensor.detach() for tensor in outs])]


CASES = pytest.mark.parametrize("case", [modulate_case, heads_case])
BATCHES = pytest.mark.parametrize(("batch", "trained"), [(1, False), (3, False), (3, True)])


@CASES
@BATCHES
def test_the_kernels_are_right(case: Callable[..., Any], batch: int, trained: bool) -> None:
    make = case(batch, trained=trained)
    for one, other in zip(make(TRITON)(), make(REFERENCE)(), strict=True):
        error = (one.float() - other.float()).norm() / other.float().norm()
        assert error < 0.01


@CASES
@BATCHES
def test_the_kernels_are_not_slower(case: Callable[..., Any], batch: int, trained: bool) -> None:
    make = case(batch, trained=trained)
    times = [triton.testing.do_bench(make(ops), warmup=50, rep=200, return_mode="median") for ops in (TRITON, LEAN)]
    print(f"\n{case.__name__} batch {batch} trained {trained}: triton {times[0]:.3f} ms, torch {times[1]:.3f} ms")
    assert times[0] < times[1] * 1.05


@CASES
def test_the_kernels_take_no_more_memory(case: Callable[..., Any]) -> None:
    make, peaks = case(3, trained=False), []
    for ops in (TRITON, LEAN):
        make(ops)()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        make(ops)()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] <= peaks[1]


def test_the_same_bits_each_time() -> None:
    make = modulate_case(3, trained=True)
    for one, other in zip(make(TRITON)(), make(TRITON)(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_with_these_kernels(compiled: bool) -> None:
    given = tokens()._replace(**{name: value.cuda() for name, value in tokens()._asdict().items() if isinstance(value, Tensor)})
    grads = []
    for ops in (TRITON, REFERENCE):
        model = dit().cuda().requires_grad_(True)
        use(model, ops)
        for block in model.blocks if compiled and ops is TRITON else ():
            block.compile(fullgraph=True, dynamic=False)
        model(given).square().mean().backward()
        grads.append(torch.cat([param.grad.flatten() for param in model.parameters() if param.grad is not None]))
    assert (grads[0] - grads[1]).norm() / grads[1].norm() < 1e-2
