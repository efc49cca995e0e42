"""Which pictures are held out: chosen by content, so that no copy of a measured picture is ever trained.

`held_out([Wish(digests, share=0.1, seed=0)])` gives the digests to hold out, of all datasets together.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from fluxsmith.config.schema import ValidationConfig
from fluxsmith.data.scan import ScannedSet
from fluxsmith.randomness import seed_for


class Wish(NamedTuple):
    """What one dataset gives: its pictures as digests of their content, the share of them, the seed of the choice."""

    digests: Sequence[str]
    share: float
    seed: int


def held_out(wishes: Sequence[Wish]) -> set[str]:
    """Content digests to hold out.

    Pictures are ranked by a hash of (seed, content), the same in every dataset, and taken from the top until each dataset has its
    share (rounded; at least one of two or more, and never all unless the share is 1). Copies of a picture, in one dataset or in
    several, are thus never divided between training and validation, and a picture added later changes little.
    """
    chosen: set[str] = set()
    for wish in wishes:
        pictures = wish.digests
        if wish.share >= 1:
            chosen |= set(pictures)
        elif wish.share > 0:
            wanted = min(max(1, math.floor(len(pictures) * wish.share + 0.5)), len(pictures) - 1)
            _take(chosen, pictures, wanted, wish.seed)
    return chosen


def _take(chosen: set[str], pictures: Sequence[str], wanted: int, seed: int) -> None:
    distinct = sorted(set(pictures), key=lambda digest: (seed_for(seed, "validation", digest), digest))
    taken = sum(digest in chosen for digest in pictures)
    for digest in distinct[:-1]:  # one distinct picture at least is trained
        if taken >= wanted:
            break
        if digest not in chosen:
            chosen.add(digest)
            taken += pictures.count(digest)


def share_of(one: ScannedSet, validation: ValidationConfig) -> float:
    """The share of a dataset that is held out; regularisation sets give none."""
    if one.config.regularisation:
        return 0.0
    return validation.share if one.config.validation_share is None else one.config.validation_share


def held_out_of(sets: Sequence[ScannedSet], validation: ValidationConfig) -> frozenset[str]:
    """The digests that a run with these datasets holds out."""
    wishes = [
        Wish(
            [item.digest for item in one.items],
            share_of(one, validation),
            validation.seed if one.config.validation_seed is None else one.config.validation_seed,
        )
        for one in sets
    ]
    return frozenset(held_out(wishes))
