"""Rows of tensors in one file a process, read again by another number of processes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fluxsmith.errors import ModelFileError, StorageError
from fluxsmith.io.durable import Disk
from fluxsmith.io.safetensors import save_weights
from fluxsmith.train.checkpoint import Sharing, State, StateFolder
from fluxsmith.train.distributed import World
from fluxsmith.train.placement import Placement, Span
from fluxsmith.train.shard_files import Stored, own_part, rank_file

WHOLE = {"a": torch.arange(70.0).view(7, 10), "b": torch.arange(3.0), "tiny": torch.ones(1, 2), "adapter": torch.arange(4.0)}
DEALT = ("a", "b", "tiny")


def dealt(rank: int, size: int) -> tuple[dict[str, Tensor], dict[str, Span]]:
    """What a process has, dealt out as torch.chunk does it."""
    tensors, spans = {"adapter": WHOLE["adapter"], "a|step": torch.tensor(5.0)}, {}
    for name in DEALT:
        height = -(-WHOLE[name].shape[0] // size)
        start = min(rank * height, WHOLE[name].shape[0])
        stop = min(start + height, WHOLE[name].shape[0])
        spans[name] = Span(start, stop, tuple(WHOLE[name].shape))
        tensors[name] = WHOLE[name][start:stop]
        tensors[f"{name}|exp_avg"] = WHOLE[name][start:stop] * 2
    return tensors, spans


def write(folder: Path, size: int) -> None:
    for rank in range(size):
        tensors, spans = dealt(rank, size)
        part, metadata = own_part(tensors, spans, is_main=rank == 0)
        save_weights(folder / rank_file("weights.safetensors", rank, size), part, metadata)


@pytest.mark.ledger("ST-32")
@pytest.mark.parametrize("written", [1, 2, 3, 5])
@pytest.mark.parametrize("read", [1, 2, 3, 4])
def test_any_number_reads_what_any_number_wrote(tmp_path: Path, written: int, read: int) -> None:
    write(tmp_path, written)
    stored = Stored(tmp_path, "weights.safetensors")
    for rank in range(read):
        expected, spans = dealt(rank, read)
        assert set(stored) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(stored.read_as(name, spans), tensor), name
    for name, tensor in WHOLE.items():
        assert torch.equal(stored.read(name), tensor)


def test_what_is_not_dealt_out_is_written_once(tmp_path: Path) -> None:
    tensors, spans = dealt(1, 2)
    part, metadata = own_part(tensors, spans, is_main=False)
    assert sorted(part) == ["a", "a|exp_avg", "b", "b|exp_avg", "tiny", "tiny|exp_avg"]
    assert '"a": [4, 7, 10]' in metadata["rows"]


def test_missing_rows_are_named(tmp_path: Path) -> None:
    write(tmp_path, 3)
    (tmp_path / rank_file("weights.safetensors", 1, 3)).unlink()
    with pytest.raises(ModelFileError, match="lacks rows of a"):
        Stored(tmp_path, "weights.safetensors").read("a")
    with pytest.raises(ModelFileError, match=r"has no ema.safetensors"):
        Stored(tmp_path, "ema.safetensors")


class Two(World):
    """The first of two processes, of which the other has trouble, or not."""

    size = 2
    other_fails = True

    def any(self, flag: bool) -> bool:
        return flag or self.other_fails


@pytest.mark.ledger("ST-32")
def test_a_state_is_that_of_all_or_of_none(tmp_path: Path) -> None:
    """A part that another process could not write takes the whole state with it; older ones stay."""
    params = {"a": torch.nn.Parameter(WHOLE["a"][:4].clone())}
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    placement, world = Placement(), Two(torch.device("cpu"))
    placement.spans = {"a": Span(0, 4, (7, 10))}
    states = StateFolder(tmp_path, Disk(), Sharing(world, placement))
    world.other_fails = False
    states.save(State(1, 0, {}, {}), params, optimizer, None, keep=1)
    world.other_fails = True
    with pytest.raises(StorageError, match="another process could not write") as error:
        states.save(State(2, 0, {}, {}), params, optimizer, None, keep=1)
    assert "the newest state is that of step 1" in " ".join(error.value.lines())
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
