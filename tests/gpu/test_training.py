"""Training on a card: mixed precision, swapped and recomputed blocks, fp8 bases, compiled blocks, and no host synchronisation in a step."""

from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from small_dit import dit, tokens

from fluxsmith.events import Bus, StepEnded
from fluxsmith.memory.block_swap import BlockSwap, swapped_blocks
from fluxsmith.memory.checkpoint import checkpoint_blocks
from fluxsmith.train.run import train

pytestmark = pytest.mark.gpu
LORA = {**tiny_run.LORA, "adapter.targets": "all", "train.device": "cuda", "train.threads": 0, "train.steps": 4, "checkpoint.every": 0}
CASES: dict[str, dict[str, Any]] = {
    "bf16": {"train.precision": "bf16"},
    "fp16": {"train.precision": "fp16"},
    "recomputed, streams on the host": {"memory.checkpointing": True, "memory.checkpointing_offload": True},
    "fp8": {"quant": {"type": "fp8"}},
    "compiled": {"memory.compile": True},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.prepare_files(tmp_path_factory.mktemp("model"))


def losses(model: Path, folder: Path, changes: dict[str, Any]) -> list[float]:
    found: list[float] = []
    config = tiny_run.config(model, folder, {**LORA, **changes})
    train(config, bus=Bus(lambda event: found.append(event.loss) if isinstance(event, StepEnded) else None))
    return found


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_losses_are_those_of_fp32(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = losses(model, tmp_path / "plain", {"train.precision": "no", "train.base_dtype": "fp32"})
    assert losses(model, tmp_path / "other", changes) == pytest.approx(plain, rel=0.05)


@pytest.mark.ledger("KS-22")
def test_swapped_blocks_give_the_same_output_with_less_memory() -> None:
    cuda = torch.device("cuda")
    given = tokens()._replace(**{name: value.to(cuda) for name, value in tokens()._asdict().items() if isinstance(value, torch.Tensor)})
    resident = dit().to(cuda)
    expected = resident(given)
    swapped = dit().to(cuda)
    before = torch.cuda.memory_allocated()
    BlockSwap(swapped, swapped_blocks(2, 3, 5), cuda).attach()
    checkpoint_blocks(swapped)
    assert torch.cuda.memory_allocated() < before
    assert torch.equal(swapped(given), expected)


def test_forward_and_backward_do_not_wait_for_the_host() -> None:
    cuda = torch.device("cuda")
    model = dit().to(cuda).requires_grad_(True)
    given = tokens()._replace(**{name: value.to(cuda) for name, value in tokens()._asdict().items() if isinstance(value, torch.Tensor)})
    model(given).square().mean().backward()  # what is made once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(given).square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
