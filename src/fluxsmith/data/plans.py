"""How one use of a picture is placed, mirrored and coloured; every draw is keyed by the use, or by the content of the picture.

`kept_plan` is what a cache holds, `live_plan` what is made of a picture at each use when nothing is cached.
"""

from fluxsmith.data.augment import face_placement, random_tint, shifted_around
from fluxsmith.data.buckets import Placement
from fluxsmith.data.scan import Item, ScannedSet
from fluxsmith.data.transforms import PixelPlan, filter_for, random_crop, random_jitter
from fluxsmith.data.types import Use
from fluxsmith.randomness import Key, python_random


def is_flipped(one: ScannedSet, use: Use, seed: int) -> bool:
    """Half of the uses of a dataset with `flip`."""
    return one.config.flip and python_random(seed, "flip", use.number).random() < 0.5


def moves(one: ScannedSet) -> bool:
    """Whether the crops of a dataset are drawn, so that a held-out picture is cropped otherwise than a trained one."""
    return one.config.crop == "random" or one.config.face_crop is not None


def still_plan(one: ScannedSet, item: Item) -> PixelPlan:
    """Nothing drawn: how held-out pictures are measured."""
    return _plan(one, item, item.placement, flipped=False)


def kept_plan(one: ScannedSet, item: Item, *, seed: int, flipped: bool) -> PixelPlan:
    """What is encoded once for a trained picture: a random crop is drawn by content."""
    return _plan(one, item, _placement(one, item, (seed, item.digest)), flipped=flipped)


def live_plan(one: ScannedSet, item: Item, use: Use, *, seed: int) -> PixelPlan:
    """What is made of a picture for this use."""
    plan = _plan(one, item, _placement(one, item, (seed, use.number)), flipped=is_flipped(one, use, seed))
    if one.config.color_jitter:
        plan = plan._replace(jitter=random_jitter(one.config.color_jitter, python_random(seed, "jitter", use.number)))
    if one.config.color_aug:
        plan = plan._replace(tint=random_tint(python_random(seed, "tint", use.number)))
    return plan


def _placement(one: ScannedSet, item: Item, key: tuple[int, Key]) -> Placement:
    """The crop; `key` is (seed, what the draw belongs to)."""
    seed, subject = key
    placement, is_random = item.placement, one.config.crop == "random"
    if one.config.face_crop is not None and item.face is not None:
        rng = python_random(seed, "face", subject)
        placement = face_placement(item.size, item.face, placement.bucket, factors=one.config.face_crop, rng=rng)
        return shifted_around(placement, item.face, item.size, rng) if is_random else placement
    return random_crop(placement, python_random(seed, "crop", subject)) if is_random else placement


def _plan(one: ScannedSet, item: Item, placement: Placement, *, flipped: bool) -> PixelPlan:
    return PixelPlan(placement, filter_for(item.size, placement.resized, one.config.interpolation), flipped)
