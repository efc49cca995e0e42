"""Batches of an epoch: complete, pure, balanced; the split without a leak."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxsmith.data.batching import Member, epoch_batches, held_out_batches, largest, uses_per_epoch
from fluxsmith.data.types import Size

A, B = Size(64, 64), Size(96, 48)


def member(count: int, *, dataset: int = 0, batch_size: int = 2, repeats: int = 1, regularisation: bool = False) -> Member:
    return Member(
        dataset, tuple(range(count)), tuple(B if place % 3 == 0 else A for place in range(count)), batch_size, repeats, regularisation
    )


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    batch_size=st.integers(1, 7),
    repeats=st.integers(1, 4),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_every_picture_is_used_as_often_as_asked(counts: list[int], batch_size: int, repeats: int, epoch: int, seed: int) -> None:
    members = [member(count, dataset=place, batch_size=batch_size, repeats=repeats) for place, count in enumerate(counts)]
    batches = epoch_batches(members, seed=seed, epoch=epoch)
    used = Counter((use.dataset, use.record) for spec in batches for use in spec.uses)
    assert used == {(place, record): repeats for place, count in enumerate(counts) for record in range(count)}
    for spec in batches:
        assert 1 <= len(spec.uses) <= batch_size
        assert {members[use.dataset].buckets[use.record] for use in spec.uses} == {spec.bucket}
        assert {use.dataset for use in spec.uses} == {spec.dataset}
    first = epoch * uses_per_epoch(members)
    assert [use.number for spec in batches for use in spec.uses] == list(range(first, first + uses_per_epoch(members)))
    assert batches == epoch_batches(members, seed=seed, epoch=epoch)


def test_only_the_last_batch_of_a_bucket_is_short() -> None:
    sizes = Counter((spec.bucket, len(spec.uses)) for spec in epoch_batches([member(15, batch_size=4)], seed=0, epoch=0))
    assert sizes == {(A, 4): 2, (A, 2): 1, (B, 4): 1, (B, 1): 1}


def test_epochs_and_seeds_differ_and_datasets_mix() -> None:
    members = [member(12), member(12, dataset=1)]
    orders = [[spec.uses for spec in epoch_batches(members, seed=seed, epoch=epoch)] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    sequence = [spec.dataset for spec in epoch_batches(members, seed=0, epoch=0)]
    assert sequence not in ([0] * 6 + [1] * 6, [1] * 6 + [0] * 6)
    together = [tuple(use.record for use in spec.uses) for spec in epoch_batches([member(12)], seed=0, epoch=0)]
    assert sorted(together) != sorted(tuple(use.record for use in spec.uses) for spec in epoch_batches([member(12)], seed=0, epoch=1))


@pytest.mark.parametrize("count", [1, 3, 10, 40])
def test_regularisation_is_used_as_often_as_training_and_pictures_of_a_bucket_take_turns(count: int) -> None:
    others = member(count, dataset=1, regularisation=True)
    members = [member(5, repeats=2), others]
    used: Counter[int] = Counter()
    lengths = set()
    for epoch in range(8):
        batches = epoch_batches(members, seed=3, epoch=epoch)
        uses = [use for spec in batches for use in spec.uses if use.dataset == 1]
        assert len(uses) == 10
        used.update(use.record for use in uses)
        lengths.add(len(batches))
    assert len(used) == count
    for bucket in (A, B):
        of_bucket = [used[record] for record, its in zip(others.records, others.buckets, strict=True) if its == bucket]
        assert max(of_bucket, default=0) - min(of_bucket, default=0) <= 1
    assert uses_per_epoch(members) == 20
    assert len(lengths) == 1


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 50), st.integers(0, 9))
def test_every_epoch_has_the_same_number_of_batches(counts: list[int], training: int, seed: int) -> None:
    sizes = [Size(16 * (place + 1), 64) for place in range(len(counts))]
    buckets = tuple(size for size, count in zip(sizes, counts, strict=True) for _ in range(count))
    members = [member(training), Member(1, tuple(range(len(buckets))), buckets, 3, regularisation=True)]
    epochs = [epoch_batches(members, seed=seed, epoch=epoch) for epoch in range(4)]
    assert len({len(batches) for batches in epochs}) == 1
    assert {sum(len(spec.uses) for spec in batches if spec.dataset) for batches in epochs} == {training}


def test_largest_needs_the_most_pixels() -> None:
    batches = epoch_batches([member(3, batch_size=8), Member(1, (0,), (Size(128, 128),), 1)], seed=0, epoch=0)
    assert largest(batches).bucket == Size(128, 128)


def test_held_out_batches_are_in_a_fixed_order() -> None:
    specs = held_out_batches([member(4, batch_size=3)])
    assert [(spec.bucket, [use.record for use in spec.uses]) for spec in specs] == [(A, [1, 2]), (B, [0, 3])]
    assert [use.number for spec in specs for use in spec.uses] == [0, 1, 2, 3]
