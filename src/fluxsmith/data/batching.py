"""Which uses of which pictures form the micro-batches of an epoch: a pure function of the manifest, the seed and the epoch.

A batch never mixes datasets or buckets; the last, short batch of a bucket is kept. Worker and process counts do not enter: a
trainer takes its share of the list.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from fluxsmith.data.types import BatchSpec, Size, Use
from fluxsmith.randomness import permutation, seed_for

VALIDATION_EPOCH = -1  # `BatchSpec.epoch` of held-out batches


class Member(NamedTuple):
    """What batching needs to know of one dataset: the records that take part, and their buckets."""

    dataset: int
    records: tuple[int, ...]  # positions in the dataset's list of usable records
    buckets: tuple[Size, ...]  # of those records
    batch_size: int = 1
    repeats: int = 1
    regularisation: bool = False


def uses_per_epoch(members: Sequence[Member]) -> int:
    """Samples in one epoch: every training picture `repeats` times, and as many regularisation pictures."""
    training = sum(len(member.records) * member.repeats for member in members if not member.regularisation)
    return training * 2 if any(member.regularisation and member.records for member in members) else training


def epoch_batches(members: Sequence[Member], *, seed: int, epoch: int) -> list[BatchSpec]:
    """All micro-batches of an epoch, in training order.

    Training pictures are used `repeats` times. Regularisation pictures together are used as often as all training pictures
    together, taking turns over the epochs (`repeats` weighs them against each other). Every epoch has the same number of batches.
    `Use.number` is `epoch * uses_per_epoch + place in the epoch`.
    """
    chosen = {member.dataset: list(member.records) * member.repeats for member in members if not member.regularisation}
    chosen |= _regularisation(members, sum(map(len, chosen.values())), seed=seed, epoch=epoch)
    batches: list[tuple[int, Size, list[int]]] = []
    for member in members:
        bucket_of = dict(zip(member.records, member.buckets, strict=True))
        groups: dict[Size, list[int]] = {}
        for record in sorted(chosen.get(member.dataset, ())):
            groups.setdefault(bucket_of[record], []).append(record)
        for bucket, records in sorted(groups.items()):
            order = permutation(len(records), seed, "order", epoch, member.dataset, bucket.width, bucket.height)
            shuffled = [records[place] for place in order]
            for start in range(0, len(shuffled), member.batch_size):
                batches.append((member.dataset, bucket, shuffled[start : start + member.batch_size]))
    order = permutation(len(batches), seed, "order", epoch, "batches")
    return _numbered([batches[place] for place in order], epoch, epoch * uses_per_epoch(members))


def _regularisation(members: Sequence[Member], wanted: int, *, seed: int, epoch: int) -> dict[int, list[int]]:
    """The `wanted` regularisation uses of an epoch, by dataset.

    Each bucket gives a fixed number in proportion to its size, so that every epoch has the same number of batches (the place of a
    step in the data is computed from it); within a bucket the epochs go on where the last one stopped.
    """
    groups: dict[tuple[int, Size], list[int]] = {}
    for member in members:
        if member.regularisation:
            for record, bucket in zip(member.records, member.buckets, strict=True):
                groups.setdefault((member.dataset, bucket), []).extend([record] * member.repeats)
    chosen: dict[int, list[int]] = {}
    for (key, ring), count in zip(groups.items(), _shares([len(ring) for ring in groups.values()], wanted), strict=True):
        dataset, bucket = key
        order = permutation(len(ring), seed, "order", "regularisation", dataset, bucket.width, bucket.height)
        chosen.setdefault(dataset, []).extend(ring[order[place % len(ring)]] for place in range(epoch * count, (epoch + 1) * count))
    return chosen


def _shares(sizes: Sequence[int], wanted: int) -> list[int]:
    """`wanted` divided in proportion to `sizes`, whole numbers that add up to it: largest remainders are rounded up."""
    total = sum(sizes)
    shares = [wanted * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda place: (-(wanted * sizes[place] % total), place))
    for place in by_remainder[: wanted - sum(shares) if sizes else 0]:
        shares[place] += 1
    return shares


def _numbered(batches: Sequence[tuple[int, Size, list[int]]], epoch: int, first: int) -> list[BatchSpec]:
    specs = []
    for dataset, bucket, records in batches:
        uses = tuple(Use(dataset, record, first + place) for place, record in enumerate(records))
        specs.append(BatchSpec(epoch, dataset, bucket, uses))
        first += len(records)
    return specs


def held_out_batches(members: Sequence[Member]) -> list[BatchSpec]:
    """Batches over held-out records, each once, in a fixed order: `Use.number` counts from 0."""
    batches = []
    for member in members:
        groups: dict[Size, list[int]] = {}
        for record, bucket in zip(member.records, member.buckets, strict=True):
            groups.setdefault(bucket, []).append(record)
        for bucket, records in sorted(groups.items()):
            for start in range(0, len(records), member.batch_size):
                batches.append((member.dataset, bucket, records[start : start + member.batch_size]))
    return _numbered(batches, VALIDATION_EPOCH, 0)


def held_out(digests: Sequence[Sequence[str]], *, share: float, seed: int) -> set[str]:
    """Content digests to hold out, of the datasets' pictures given as digests.

    Pictures are ranked by a hash of (seed, content), the same in every dataset, and taken from the top until each dataset has its
    share (rounded; at least one of two or more). Copies of a picture, in one dataset or in several, are thus never divided between
    training and validation, and a picture added later changes little.
    """
    chosen: set[str] = set()
    if share <= 0:
        return chosen
    for pictures in digests:
        distinct = sorted(set(pictures), key=lambda digest: (seed_for(seed, "validation", digest), digest))
        wanted = min(max(1, math.floor(len(pictures) * share + 0.5)), len(pictures) - 1)
        taken = sum(digest in chosen for digest in pictures)
        for digest in distinct[:-1]:  # one distinct picture at least is trained
            if taken >= wanted:
                break
            if digest not in chosen:
                chosen.add(digest)
                taken += pictures.count(digest)
    return chosen


def largest(batches: Sequence[BatchSpec]) -> BatchSpec:
    """The batch with the most pixels in all; of equals the one with the largest pictures, then the first."""
    return max(batches, key=lambda spec: (len(spec.uses) * spec.bucket.width * spec.bucket.height, spec.bucket.width * spec.bucket.height))
