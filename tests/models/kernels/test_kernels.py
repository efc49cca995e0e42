"""Each kernel equals its twin in plain PyTorch, forward and backward. Runs on a card, or in Triton's interpreter.

Without a card: `TRITON_INTERPRET=1 pytest tests/models/kernels`. Skipped where triton is not installed.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny_run
import torch
from streams import tokens
from torch import Tensor

from fluxsmith.models.attention import rotary_table
from fluxsmith.models.fused import row_scales
from fluxsmith.models.ops import REFERENCE, plain_heads, use

pytest.importorskip("triton")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from fluxsmith.models.kernels import heads, norm
from fluxsmith.models.kernels.table import TRITON

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
KINDS = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return made.requires_grad_(grad)


def turning(rows: int, width: int) -> Tensor:
    return rotary_table(torch.arange(float(rows))[None], width, 10_000.0)[:, None].to(DEVICE)


def results(function: Callable[..., Any], inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, then gradients of a fixed weighted sum of them; the weights are numbers of `dtype`."""
    out = function(*inputs)
    outs = list(out) if isinstance(out, tuple) else [out]
    weights = [draw(*tensor.shape, seed=100 + number, dtype=dtype, grad=False).to(tensor.dtype) for number, tensor in enumerate(outs)]
    return [*outs, *torch.autograd.grad(outs, [tensor for tensor in inputs if tensor.requires_grad], weights)]


def assert_same(kernel: Callable[..., Any], twin: Callable[..., Any], inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """The twin computes in fp32 from the same rounded inputs: the truth, not another rounding. Errors are relative to a tensor's size."""
    exact = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in inputs]
    mine, theirs = results(kernel, inputs, dtype), results(twin, exact, dtype)
    for one, other in zip(mine, theirs, strict=True):
        assert one.shape == other.shape
        assert one.dtype in (dtype, torch.float32)
        allowed = TOLERANCES[dtype]
        torch.testing.assert_close(one.float(), other, rtol=allowed, atol=allowed * max(1.0, float(other.detach().abs().max()) / 4))


def modulation(batch: int, rows: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    mods = [draw(batch, 1, width, seed=seed, dtype=dtype) for seed in (1, 2)]
    return draw(batch, rows, width, dtype=dtype), mods[0], mods[1]


@KINDS
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("rows", "width"), [(5, 64), (19, 100)])
def test_modulate(dtype: torch.dtype, batch: int, rows: int, width: int) -> None:
    """19 rows are not a multiple of a program's 16, 100 channels not a power of two."""
    assert_same(TRITON.modulate, REFERENCE.modulate, modulation(batch, rows, width, dtype), dtype)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("wanted", [(True, False, False), (True, True, False), (True, False, True), (False, True, True)], ids=str)
def test_only_the_gradients_that_are_asked_for(batch: int, wanted: tuple[bool, ...]) -> None:
    inputs = [tensor.detach().requires_grad_(want) for tensor, want in zip(modulation(batch, 5, 24), wanted, strict=True)]
    assert_same(TRITON.modulate, REFERENCE.modulate, inputs, torch.float32)


def test_modulate_reads_slices_and_one_shift_for_all_samples() -> None:
    """The image part of a joint sequence, chunks of one projection, and a gradient whose channels lie apart."""
    joint, chunks = draw(3, 9, 24), draw(3, 1, 72, seed=1)

    def run(modulate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda joint, chunks: modulate(joint[:, 4:], chunks[..., :24][:1], chunks[..., 24:48]).transpose(1, 2)

    assert_same(run(TRITON.modulate), run(REFERENCE.modulate), (joint, chunks), torch.float32)


def test_channels_that_lie_apart_are_read_right() -> None:
    inputs = (draw(2, 24, 5), draw(24, 1, 2, seed=1), draw(2, 1, 24, seed=2))

    def run(modulate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, shift, scale: modulate(x.transpose(1, 2), shift.transpose(0, 2), scale)

    assert_same(run(TRITON.modulate), run(REFERENCE.modulate), inputs, torch.float32)


def test_large_means_do_not_cancel() -> None:
    x, shift, scale = modulation(1, 3, 64)
    truth = REFERENCE.modulate((x + 1000).double(), shift.double(), scale.double()).float()
    torch.testing.assert_close(TRITON.modulate(x + 1000, shift, scale), truth, rtol=1e-3, atol=1e-3)


def test_what_does_not_fit_is_refused() -> None:
    x, shift, scale = modulation(2, 3, 8)
    with pytest.raises(TypeError, match="float64"):
        TRITON.modulate(x.double(), shift, scale)
    with pytest.raises(ValueError, match="scale"):
        TRITON.modulate(x, shift, scale[..., :4])
    with pytest.raises(TypeError, match="qkv"):
        TRITON.heads(draw(1, 2, 24).double(), [(2, draw(4), draw(4))], turning(2, 4), 2)


def heads_case(rows: tuple[int, ...], num_heads: int, width: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    pe = turning(sum(rows), width)

    def case(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda qkv, *own: function(qkv, [(n, own[2 * i], own[2 * i + 1]) for i, n in enumerate(rows)], pe, num_heads)

    return case


@KINDS
@pytest.mark.parametrize(("batch", "rows"), [(1, (7,)), (3, (2, 3))], ids=["one stream", "text and image"])
@pytest.mark.parametrize(("num_heads", "width"), [(2, 64), (2, 128), (24, 64), (24, 128), (3, 12)])
def test_heads(dtype: torch.dtype, batch: int, rows: tuple[int, ...], num_heads: int, width: int) -> None:
    qkv = draw(batch, sum(rows), 3 * num_heads * width, dtype=dtype)
    scales = [draw(width, seed=10 + number) for number in range(2 * len(rows))]
    case = heads_case(rows, num_heads, width)
    assert_same(case(TRITON.heads), case(plain_heads), (qkv, *scales), dtype)


def test_frozen_norms_and_a_slice_of_a_wider_product() -> None:
    """Single blocks make qkv beside the MLP's input; and each sample may have a table of its own."""
    wide, scales = draw(3, 5, 3 * 2 * 16 + 7), [draw(16, seed=seed, grad=False) for seed in (1, 2)]
    pe = torch.cat([turning(5 + number, 16)[:, :, number:] for number in range(3)])

    def run(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda wide: function(wide[..., :96], [(5, scales[0], scales[1])], pe, 2)

    assert_same(run(TRITON.heads), run(plain_heads), (wide,), torch.float32)


def test_gradients_in_any_layout() -> None:
    """Sums expand, attention transposes, unused outputs have none."""
    qkv, scales = draw(2, 5, 96), [(5, draw(16, seed=1, grad=False), draw(16, seed=2, grad=False))]
    grads = []
    for function in (TRITON.heads, plain_heads):
        q, k, v = function(qkv, scales, turning(5, 16), 2)
        total = (q.transpose(-1, -2).contiguous() * draw(2, 2, 16, 5, seed=3, grad=False)).sum() + v[:, :, 2:].sum() * 0.3
        grads.append(torch.autograd.grad(total, qkv)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)


def test_q_and_k_lie_as_attention_returns_them() -> None:
    """(B, N, H, D) in memory: the copy before the output projection falls away; v is no copy at all."""
    qkv = draw(1, 5, 96, grad=False)
    q, k, v = TRITON.heads(qkv, [(5, draw(16), draw(16))], turning(5, 16), 2)
    assert q.transpose(1, 2).is_contiguous()
    assert k.transpose(1, 2).is_contiguous()
    assert v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()


def test_only_inputs_are_kept() -> None:
    kept: list[Tensor] = []
    qkv, x = draw(1, 7, 96), modulation(1, 3, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        TRITON.modulate(*x)
        heads.NormRotate.apply(qkv, row_scales([(7, torch.ones(16, device=DEVICE), torch.ones(16, device=DEVICE))]), turning(7, 16), 2)
    assert sum(tensor.numel() for tensor in kept) == 3 * 8 + 8 + qkv.numel() + 2 * 16 + 7 * 16


@pytest.mark.parametrize("with_sums", [False, True])
def test_operators_keep_the_rules_of_the_compiler(with_sums: bool) -> None:
    """Schemas, fake implementations against real ones, aliasing."""
    checks = ("test_schema", "test_faketensor")
    x, shift, scale = (tensor.detach() for tensor in modulation(2, 5, 8))
    torch.library.opcheck(norm.modulate, (x, shift, scale), test_utils=checks)
    torch.library.opcheck(norm.modulate_backward, (x, x, scale, with_sums), test_utils=checks)
    qkv, scales, pe = draw(2, 3, 24, grad=False), draw(3, 2, 1, 4, grad=False), turning(3, 4)
    torch.library.opcheck(heads.norm_rotate, (qkv, scales, pe, 2), test_utils=checks)
    grads = [draw(2, 2, 3, 4, seed=seed, grad=False) for seed in range(3)]
    torch.library.opcheck(heads.norm_rotate_backward, (grads, qkv, scales, pe, with_sums), test_utils=checks)


def trained(compiled: bool) -> tuple[Tensor, list[Tensor]]:
    dit = tiny_run.random_dit().to(DEVICE).requires_grad_(True)
    use(dit, TRITON if compiled else REFERENCE)
    for block in dit.blocks if compiled else ():
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    given = tokens()._replace(**{name: value.to(DEVICE) for name, value in tokens()._asdict().items() if isinstance(value, Tensor)})
    out = dit(given)
    out.square().mean().backward()
    return out, [param.grad for param in dit.parameters() if param.grad is not None]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_with_these_kernels_trains_as_the_plain_one() -> None:
    torch._dynamo.reset()
    mine, theirs = trained(compiled=True), trained(compiled=False)
    torch._dynamo.reset()
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-4, atol=1e-5)
    assert len(mine[1]) == len(theirs[1]) > 0
    for one, other in zip(mine[1], theirs[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
