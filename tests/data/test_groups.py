"""Datasets that share batches: each sample keeps what its own dataset asks for, and balance and resume stay exact."""

from collections import Counter
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxsmith.config.schema import ValidationConfig
from fluxsmith.data.batching import Member, epoch_batches, held_out_batches, uses_per_epoch
from fluxsmith.data.types import Size
from fluxsmith.errors import ConfigError

A, B = Size(64, 64), Size(96, 48)
SQUARE = [(64, 64)]


def member(count: int, dataset: int, *, group: str = "g", batch_size: int = 4, repeats: int = 1, regularisation: bool = False) -> Member:
    buckets = tuple(B if place % 3 == 0 else A for place in range(count))
    return Member(dataset, tuple(range(count)), buckets, batch_size, repeats, regularisation, group)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(1, 5), st.integers(0, 3), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_group_is_batched_like_one_dataset(counts: list[int], batch_size: int, epoch: int, seed: int) -> None:
    members = [member(count, place, batch_size=batch_size) for place, count in enumerate(counts)]
    batches = epoch_batches(members, seed=seed, epoch=epoch)
    used = Counter((use.dataset, use.record) for spec in batches for use in spec.uses)
    assert used == {(place, record): 1 for place, count in enumerate(counts) for record in range(count)}
    in_bucket = Counter(members[use.dataset].buckets[use.record] for spec in batches for use in spec.uses)
    assert len(batches) == sum(-(-count // batch_size) for count in in_bucket.values())
    for spec in batches:
        assert spec.dataset == 0
        assert {members[use.dataset].buckets[use.record] for use in spec.uses} == {spec.bucket}
    assert batches == epoch_batches(members, seed=seed, epoch=epoch), "a pure function"
    first = epoch * uses_per_epoch(members)
    assert [use.number for spec in batches for use in spec.uses] == list(range(first, first + uses_per_epoch(members)))


def test_a_group_mixes_and_no_group_does_not() -> None:
    together = epoch_batches([member(12, 0), member(12, 1)], seed=0, epoch=0)
    assert any(len({use.dataset for use in spec.uses}) == 2 for spec in together)
    apart = epoch_batches([member(12, 0, group="x"), member(12, 1, group="y"), member(12, 2, group="")], seed=0, epoch=0)
    assert all(len({use.dataset for use in spec.uses}) == 1 for spec in apart)
    assert {use.dataset for spec in held_out_batches([member(3, 0), member(3, 1)]) for use in spec.uses} == {0, 1}


def test_a_group_of_one_is_no_group() -> None:
    assert epoch_batches([member(9, 0), member(5, 1, group="")], seed=3, epoch=1) == epoch_batches(
        [member(9, 0, group=""), member(5, 1, group="")], seed=3, epoch=1
    )


def peer_counts(pictures: int, wanted: int) -> list[int]:
    """How often sd-scripts uses each regularisation picture: all once, then one more each in order, until the total is reached."""
    counts = [0] * pictures
    for place, _ in zip(cycle(range(pictures)), range(wanted), strict=False):
        counts[place] += 1
    return counts


@pytest.mark.ledger("KS-42")
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_regularisation_of_a_group_balances_as_sd_scripts_does(training: int, others: int, repeats: int, seed: int) -> None:
    """As many pictures are used as often in each epoch; which of them are used once more changes here, so that all take turns."""
    members = [
        member(training, 0, repeats=repeats),
        member(others, 1, regularisation=True),
        member(7, 2, group="elsewhere"),
    ]
    wanted = training * repeats
    for epoch in range(3):
        used: Counter[int] = Counter()
        for spec in epoch_batches(members, seed=seed, epoch=epoch):
            used.update(use.record for use in spec.uses if use.dataset == 1)
        assert sorted(used[record] for record in range(others)) == sorted(peer_counts(others, wanted))
    assert uses_per_epoch(members) == 2 * wanted + 7


def test_regularisation_without_a_group_balances_what_is_outside() -> None:
    grouped = [member(5, 0, repeats=2), member(3, 1, regularisation=True)]
    outside = [member(4, 2, group=""), member(9, 3, group="", regularisation=True)]

    def uses(members: list[Member]) -> Counter[int]:
        return Counter(use.dataset for spec in epoch_batches(members, seed=0, epoch=0) for use in spec.uses)

    assert uses([*grouped, *outside]) == {0: 10, 1: 10, 2: 4, 3: 4}
    assert uses([*grouped, outside[1]]) == {0: 10, 1: 10, 3: 10}, "with nothing outside, all training pictures count"
    assert uses([outside[0], outside[1], member(6, 4, group="", regularisation=True)])[2] == 4


@pytest.mark.ledger("KS-42")
def test_samples_keep_what_their_own_dataset_asks_for(workshop: Any, make_folder: Any, tmp_path: Path) -> None:
    first = make_folder(tmp_path / "first", 6, sizes=SQUARE)
    second = make_folder(tmp_path / "second", 6, sizes=SQUARE)
    options = {"group": "g", "batch_size": 4, "repeats": 5}
    data = workshop.prepare(
        workshop.config(first, flip=True, captions={"prefix": "one"}, **options),
        workshop.config(second, preserve=True, weight=0.25, regularisation=True, captions={"prefix": "two"}, **options),
    )
    assert "latents cache: 12 new" in data.cache_summary[0], "only the first set is mirrored, and the same pictures are encoded once"
    mixed = 0
    for spec in data.batches(0):
        batch = data.load(spec, step=0)
        sets = torch.tensor([use.dataset for use in spec.uses])
        assert torch.equal(batch.weights, torch.where(sets == 1, 0.25, 1.0))
        assert [caption.split()[0] for caption in batch.captions] == ["two" if place else "one" for place in sets.tolist()]
        assert batch.preserve is None if not sets.any() else torch.equal(batch.preserve, sets == 1)
        mixed += len(set(sets.tolist())) == 2
    assert mixed
    assert [len(spec.uses) for spec in data.batches(0)].count(4) == 15


def test_a_group_has_one_size_and_one_length_of_batch(workshop: Any, folder: Path) -> None:
    def refused(**other: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            workshop.prepare(workshop.config(folder, group="g"), workshop.config(folder, group="g", **other))
        return "\n".join(caught.value.lines())

    assert "differ in resolution" in refused(resolution=96)
    assert "differ in batch_size" in refused(batch_size=2)
    assert "differ in buckets" in refused(buckets={"step": 32})
    assert "condition pictures" in refused(condition_dir=folder)
    both = refused(resolution=96, batch_size=2)
    assert both.count("error[config]") == 2
    workshop.prepare(workshop.config(folder, group="g"), workshop.config(folder, group="g", resolution=(64, 64)))


def test_a_group_in_a_digest_and_in_validation(workshop: Any, make_folder: Any, tmp_path: Path) -> None:
    first, second = make_folder(tmp_path / "first", 5, sizes=SQUARE), make_folder(tmp_path / "second", 5, sizes=SQUARE)
    for place, path in enumerate(sorted(second.glob("*.png"))):
        path.write_bytes(path.read_bytes() + bytes([place]))  # other pictures
    plain = workshop.prepare(workshop.config(first, batch_size=4), workshop.config(second, batch_size=4))
    data = workshop.prepare(workshop.config(first, batch_size=4, group="g"), workshop.config(second, batch_size=4, group="g"))
    assert data.digest != plain.digest
    assert [len(spec.uses) for spec in plain.batches(0)].count(4) == 2
    assert sorted(len(spec.uses) for spec in data.batches(0)) == [2, 4, 4]
    split = data.hold_out(ValidationConfig(share=0.4))
    assert [len(spec.uses) for spec in split.validation_batches()] == [4]
