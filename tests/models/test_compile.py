"""Each block compiles whole (`fullgraph`), and hooks around blocks never make it compile again.

The backend `aot_eager` traces and partitions forward and backward like the real ones but makes no machine code.
"""

import shutil
from collections.abc import Callable, Iterator

import pytest
import tiny_run
import torch
from quantised import adapted, normal_dit
from streams import At, Residual, extra_keys, tokens
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fluxsmith.models.compiling import VARIANTS, compile_blocks
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.stream import BlockHook


def with_extra_keys(scale: Tensor) -> BlockHook:
    """For both blocks, made anew with each call."""
    return At(0, lambda stream: stream._replace(ip=(extra_keys(1.0, after_block=False)._replace(scale=scale),)))


pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks at it


@pytest.fixture
def compiled() -> Iterator[tuple[FluxDiT, CompileCounterWithBackend]]:
    torch._dynamo.reset()
    counter, dit = CompileCounterWithBackend("aot_eager"), tiny_run.random_dit()
    for block in dit.blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    yield dit, counter
    torch._dynamo.reset()


@pytest.mark.parametrize("train", [False, True])
def test_blocks_compile_whole_and_once(compiled: tuple[FluxDiT, CompileCounterWithBackend], train: bool) -> None:
    dit, counter = compiled
    plain = tiny_run.random_dit()
    dit.requires_grad_(train)
    with torch.set_grad_enabled(train):
        for seed in range(3):
            torch.testing.assert_close(dit(tokens(seed)), plain(tokens(seed)), atol=1e-5, rtol=0)
    assert counter.frame_count == 2, "one graph a block"


def test_fresh_hooks_do_not_compile_again(compiled: tuple[FluxDiT, CompileCounterWithBackend]) -> None:
    dit, counter = compiled
    plain = tiny_run.random_dit()
    kinds: list[Callable[[Tensor], BlockHook]] = [Residual, with_extra_keys]
    seen = []
    for make in kinds:
        for seed in range(4):
            scale = torch.tensor(0.5 + seed)
            torch.testing.assert_close(dit(tokens(seed), [make(scale)]), plain(tokens(seed), [make(scale)]), atol=1e-5, rtol=0)
            seen.append(counter.frame_count)
    assert seen[1:4] == [seen[0]] * 3
    assert seen[5:] == [seen[4]] * 3
    assert seen[-1] <= 4, "each block: without and with extra keys"


def test_gradients_equal_eager_ones(compiled: tuple[FluxDiT, CompileCounterWithBackend]) -> None:
    dit, plain = compiled[0], tiny_run.random_dit()
    for model in (dit, plain):
        model(tokens(0), [Residual(torch.tensor(0.3))]).square().mean().backward()
    for (name, one), other in zip(dit.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.ledger("FS-08")
def test_a_second_length_makes_graphs_for_all_others() -> None:
    """Far fewer variants than torch's limit, beyond which it would go on uncompiled and say nothing."""
    torch._dynamo.reset()
    counter, dit, plain = CompileCounterWithBackend("eager"), tiny_run.random_dit(), tiny_run.random_dit()
    compile_blocks(dit, backend=counter)
    seen = []
    with torch.no_grad():
        for cells in (4, 6, 8):
            torch.testing.assert_close(dit(tokens(0, cells=cells)), plain(tokens(0, cells=cells)), atol=1e-5, rtol=0)
            seen.append(counter.frame_count)
    torch._dynamo.reset()
    assert seen == [2, 4, 4]
    assert torch._dynamo.config.recompile_limit >= VARIANTS


@pytest.mark.ledger("FS-08")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_machine_code_gives_the_same_numbers() -> None:
    """One block with its adapters through the whole compiler, the most that a test has time for."""
    torch._dynamo.reset()
    compiled, plain = normal_dit(), normal_dit()
    for dit in (compiled, plain):
        dit.double_blocks = torch.nn.ModuleList()
        adapted(dit, targets="blocks")
    compile_blocks(compiled)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens(0)), plain(tokens(0)), atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
