"""Where a run is, from the step number alone: parts for processes, epochs, and which steps complete them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxsmith.data.types import BatchSpec, Size, Use
from fluxsmith.train.plan import BatchPlan


def batches(per_epoch: int) -> "list[list[BatchSpec]]":
    size = Size(64, 64)
    return [[BatchSpec(epoch, 0, size, (Use(0, place, epoch * per_epoch + place),)) for place in range(per_epoch)] for epoch in range(200)]


def plan(per_epoch: int, accumulation: int, world: int = 1) -> BatchPlan:
    made = batches(per_epoch)
    return BatchPlan(lambda epoch: made[epoch], accumulation, world)


def uses(plan: BatchPlan, steps: int, world: int = 1) -> list[list[tuple[int, int]]]:
    """(number, global index of the use) of each process in each step."""
    return [
        [(number, spec.uses[0].number) for rank in range(world) for number, spec in plan.micro_batches(step, rank)] for step in range(steps)
    ]


@given(per_epoch=st.integers(1, 9), accumulation=st.integers(1, 4), world=st.integers(1, 4))
def test_every_micro_batch_is_used_once_in_order(per_epoch: int, accumulation: int, world: int) -> None:
    found = [pair for step in uses(plan(per_epoch, accumulation, world), 12, world) for pair in sorted(step)]
    assert found == [(number, number) for number in range(12 * accumulation * world)]


@given(per_epoch=st.integers(1, 9), accumulation=st.integers(1, 3), world=st.integers(1, 4), step=st.integers(0, 10))
def test_more_processes_are_more_accumulation(per_epoch: int, accumulation: int, world: int, step: int) -> None:
    """The same micro-batches in a step: W processes with accumulation A, one with W * A."""
    many, one = plan(per_epoch, accumulation, world), plan(per_epoch, accumulation * world)
    shared = sorted(pair[0] for rank in range(world) for pair in many.micro_batches(step, rank))
    assert shared == [number for number, _ in one.micro_batches(step)]
    assert len({len(many.micro_batches(step, rank)) for rank in range(world)}) == 1, "every process has as much to do"
    assert many.per_step == one.per_step


@pytest.mark.ledger("KS-12")
@pytest.mark.parametrize(
    ("steps", "epochs", "per_epoch", "accumulation", "world", "expected"),
    [
        (7, None, 10, 3, 1, 7),
        (None, 1, 10, 1, 1, 10),
        (None, 2, 10, 4, 1, 5),
        (None, 2, 10, 3, 1, 7),
        (None, 3, 7, 2, 2, 6),
        (None, 1, 3, 8, 1, 1),
    ],
)
def test_length(steps: int | None, epochs: int | None, per_epoch: int, accumulation: int, world: int, expected: int) -> None:
    assert plan(per_epoch, accumulation, world).total_steps(steps, epochs) == expected


def test_epochs_of_steps() -> None:
    one = plan(5, 2)  # epochs end inside steps
    assert [one.epoch_of(step) for step in range(6)] == [0, 0, 0, 1, 1, 2]
    assert [one.epochs_done(step) for step in range(7)] == [0, 0, 0, 1, 1, 2, 2]


def test_steps_that_complete_epochs() -> None:
    one = plan(5, 2)
    assert [step for step in range(1, 11) if one.is_epoch_due(step, 1)] == [3, 5, 8, 10]
    assert [step for step in range(1, 11) if one.is_epoch_due(step, 2)] == [5, 10]
    assert not any(one.is_epoch_due(step, 0) for step in range(1, 11))


def test_a_step_that_completes_several_epochs_is_due() -> None:
    one = plan(2, 3)  # one and a half epochs a step
    assert [step for step in range(1, 9) if one.is_epoch_due(step, 2)] == [2, 3, 4, 6, 7, 8]
    assert [step for step in range(1, 9) if one.is_epoch_due(step, 3)] == [2, 4, 6, 8]
