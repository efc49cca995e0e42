"""Compiled blocks (whole, as `Pipeline.load(compile=True)` does it): fresh references, regions and values do not compile them again."""

from collections.abc import Iterator, Sequence

import pytest
import tiny_run
import torch
from small_dit import tokens
from torch._dynamo.testing import CompileCounterWithBackend

from fluxsmith.controls.base import ResidualHook
from fluxsmith.controls.eligen import Entities, Regions
from fluxsmith.controls.kontext import Kontext
from fluxsmith.controls.value import Rows
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.stream import Conditioner, Tokens

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks at it


@pytest.fixture
def compiled() -> Iterator[tuple[FluxDiT, CompileCounterWithBackend]]:
    torch._dynamo.reset()
    counter, dit = CompileCounterWithBackend("eager"), tiny_run.random_dit()
    for block in dit.blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=True)
    yield dit, counter
    torch._dynamo.reset()


def fresh(seed: int) -> Sequence[Conditioner]:
    """Other pictures of other sizes, other regions, other values."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(2, 4, 4, generator=generator) > 0.5
    return (
        Kontext.of([torch.randn(1, 16, 4, 6 + 2 * seed, generator=generator)]),
        Rows(torch.randn(1, 2, tiny_run.TEXT, generator=generator)),
        Entities(torch.randn(2, 3, tiny_run.TEXT, generator=generator), None, Regions(masks, masks.any(dim=0))),
    )


def given(controls: Sequence[Conditioner]) -> Tokens:
    made = tokens()
    for control in controls:
        made = control.tokens(made)
    return made


@torch.no_grad()
def test_fresh_conditions_do_not_compile_again(compiled: tuple[FluxDiT, CompileCounterWithBackend]) -> None:
    dit, counter = compiled
    plain, seen = tiny_run.random_dit(), []
    for seed in range(3):
        made = given(fresh(seed))
        hooks = [ResidualHook(lambda index, size=0.1 * seed: torch.full((1, 4, tiny_run.HIDDEN), size * (index + 1)))]
        torch.testing.assert_close(dit(made, hooks), plain(made, hooks), atol=1e-5, rtol=0)
        seen.append(counter.frame_count)
    assert seen == [2] * 3, "one graph a block"
