"""Which uses of which pictures form the micro-batches of an epoch: a pure function of the manifest, the seed and the epoch.

A batch never mixes buckets, and mixes datasets only of one group; the last, short batch of a bucket is kept. Worker and process
counts do not enter: a trainer takes its share of the list.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fluxsmith.data.types import BatchSpec, Size, Use
from fluxsmith.randomness import permutation

VALIDATION_EPOCH = -1  # `BatchSpec.epoch` of held-out batches


class Member(NamedTuple):
    """What batching needs to know of one dataset: the records that take part, and their buckets."""

    dataset: int
    records: tuple[int, ...]  # positions in the dataset's list of usable records
    buckets: tuple[Size, ...]  # of those records
    batch_size: int = 1
    repeats: int = 1
    regularisation: bool = False
    group: str = ""  # members with the same one share batches


Pick = tuple[int, int]  # dataset, record


def uses_per_epoch(members: Sequence[Member]) -> int:
    """Samples in one epoch: every training picture `repeats` times, and as many regularisation pictures."""
    return _training(members) + sum(wanted for others, wanted in _balances(members) if any(member.records for member in others))


def epoch_batches(members: Sequence[Member], *, seed: int, epoch: int) -> list[BatchSpec]:
    """All micro-batches of an epoch, in training order.

    Training pictures are used `repeats` times. Regularisation pictures together are used as often as the training pictures that
    they are balanced against (those of their group, else all others), taking turns over the epochs (`repeats` weighs them against
    each other). Every epoch has the same number of batches. `Use.number` is `epoch * uses_per_epoch + place in the epoch`.
    """
    chosen = {member.dataset: list(member.records) * member.repeats for member in members if not member.regularisation}
    for others, wanted in _balances(members):
        chosen |= _regularisation(others, wanted, seed=seed, epoch=epoch)
    batches: list[tuple[int, Size, list[Pick]]] = []
    for pool in _pools(members):
        first = pool[0]
        for bucket, picks in _by_bucket(pool, chosen):
            order = permutation(len(picks), seed, "order", epoch, first.dataset, bucket.width, bucket.height)
            shuffled = [picks[place] for place in order]
            for start in range(0, len(shuffled), first.batch_size):
                batches.append((first.dataset, bucket, shuffled[start : start + first.batch_size]))
    order = permutation(len(batches), seed, "order", epoch, "batches")
    return _numbered([batches[place] for place in order], epoch, epoch * uses_per_epoch(members))


def _pools(members: Sequence[Member]) -> list[list[Member]]:
    """Members that share batches, in order of the first of each."""
    pools: dict[str | int, list[Member]] = {}
    for member in members:
        pools.setdefault(member.group or member.dataset, []).append(member)
    return list(pools.values())


def _by_bucket(pool: Sequence[Member], chosen: Mapping[int, Sequence[int]]) -> list[tuple[Size, list[Pick]]]:
    """The chosen records of a pool by bucket; buckets and records in a fixed order."""
    picks: dict[Size, list[Pick]] = {}
    for member in pool:
        bucket_of = dict(zip(member.records, member.buckets, strict=True))
        for record in sorted(chosen.get(member.dataset, ())):
            picks.setdefault(bucket_of[record], []).append((member.dataset, record))
    return sorted(picks.items())


def _training(members: Sequence[Member]) -> int:
    """Uses of training pictures in an epoch."""
    return sum(len(member.records) * member.repeats for member in members if not member.regularisation)


def _balances(members: Sequence[Member]) -> list[tuple[list[Member], int]]:
    """Regularisation members that are balanced together, and their uses in an epoch.

    A group with pictures of both kinds is balanced in itself. All other regularisation members are balanced together against the
    training pictures outside such groups, or against all of them when there are none outside.
    """
    balances: list[tuple[list[Member], int]] = []
    rest: list[Member] = []
    for pool in _pools(members):
        others = [member for member in pool if member.regularisation]
        if pool[0].group and others and _training(pool):
            balances.append((others, _training(pool)))
        else:
            rest += pool
    others = [member for member in rest if member.regularisation]
    if others:
        balances.append((others, _training(rest) or _training(members)))
    return balances


def _regularisation(members: Sequence[Member], wanted: int, *, seed: int, epoch: int) -> dict[int, list[int]]:
    """The `wanted` regularisation uses of an epoch, by dataset.

    Each bucket gives a fixed number in proportion to its size, so that every epoch has the same number of batches (the place of a
    step in the data is computed from it); within a bucket the epochs go on where the last one stopped.
    """
    groups: dict[tuple[int, Size], list[int]] = {}
    for member in members:
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


def _numbered(batches: Sequence[tuple[int, Size, list[Pick]]], epoch: int, first: int) -> list[BatchSpec]:
    specs = []
    for dataset, bucket, picks in batches:
        uses = tuple(Use(*pick, first + place) for place, pick in enumerate(picks))
        specs.append(BatchSpec(epoch, dataset, bucket, uses))
        first += len(picks)
    return specs


def held_out_batches(members: Sequence[Member]) -> list[BatchSpec]:
    """Batches over held-out records, each once, in a fixed order: `Use.number` counts from 0."""
    batches = []
    for pool in _pools(members):
        size = pool[0].batch_size
        for bucket, picks in _by_bucket(pool, {member.dataset: member.records for member in pool}):
            batches += [(pool[0].dataset, bucket, picks[start : start + size]) for start in range(0, len(picks), size)]
    return _numbered(batches, VALIDATION_EPOCH, 0)


def largest(batches: Sequence[BatchSpec]) -> BatchSpec:
    """The batch with the most pixels in all; of equals the one with the largest pictures, then the first."""
    return max(batches, key=lambda spec: (len(spec.uses) * spec.bucket.width * spec.bucket.height, spec.bucket.width * spec.bucket.height))
