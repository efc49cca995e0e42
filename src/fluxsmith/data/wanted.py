"""What the caches of a run have to hold: latents and masks of every picture as it is cropped and mirrored, and every caption.

`wanted_latents(sets, encoder=digest, seed=42)` goes to `fill.fill_latents`.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from fluxsmith.data.cache import latents_key, mask_key, text_key
from fluxsmith.data.captions import can_be_empty, steady
from fluxsmith.data.companions import Companion, read_mask
from fluxsmith.data.fill import CHANGED_CAPTION, CHANGED_PICTURE, NEW, OTHER, Wanted, WantedText
from fluxsmith.data.loading import picture_pixels
from fluxsmith.data.plans import kept_plan, moves, still_plan
from fluxsmith.data.scan import Item, ScannedSet, caption_digest
from fluxsmith.data.transforms import PixelPlan


def wanted_latents(sets: Sequence[ScannedSet], *, encoder: str, seed: int, held: frozenset[str] = frozenset()) -> list[Wanted]:
    """An entry for every picture, another one mirrored where uses are; held-out pictures as they are measured."""
    wanted = []
    for one, place, item, plan in _plans(sets, seed, held):
        why = _why(item, CHANGED_PICTURE, item.before is not None and item.before.digest != item.digest)
        key = latents_key(item.digest, plan, one.config.background, encoder)

        def read(item: Item = item, one: ScannedSet = one, plan: PixelPlan = plan) -> Tensor:
            return picture_pixels(item, one.config, plan)

        wanted.append(Wanted(key, one.index, place, plan.placement.bucket, item.record.key, why, read))
    return wanted


def wanted_masks(sets: Sequence[ScannedSet], *, seed: int, held: frozenset[str] = frozenset()) -> list[Wanted]:
    """An entry for every picture that has a mask, not mirrored."""
    wanted = []
    for one, place, item, plan in _plans(sets, seed, held):
        mask = item.mask
        if mask is None or plan.flipped:
            continue
        key = mask_key(mask.digest, plan.placement, is_alpha=mask.is_alpha)

        def read(mask: Companion = mask, one: ScannedSet = one, plan: PixelPlan = plan) -> Tensor:
            return read_mask(mask, plan.placement, one.config)

        wanted.append(Wanted(key, one.index, place, plan.placement.bucket, item.record.key, _why(item, OTHER, False), read))
    return wanted


def _plans(sets: Sequence[ScannedSet], seed: int, held: frozenset[str]) -> Iterator[tuple[ScannedSet, int, Item, PixelPlan]]:
    """All crops: those of trained pictures, and of the held-out ones that are cropped otherwise when measured."""
    for one in sets:
        for place, item in enumerate(one.items):
            if item.digest not in held:
                for flipped in (False, True) if one.config.flip else (False,):
                    yield one, place, item, kept_plan(one, item, seed=seed, flipped=flipped)
            elif moves(one) and not one.config.regularisation:
                yield one, place, item, still_plan(one, item)


def wanted_text(sets: Sequence[ScannedSet], *, encoder: str) -> list[WantedText]:
    """An entry for every caption, and the empty one where captions are dropped."""
    wanted = []
    for one in sets:
        for item in one.items:
            why = _why(item, CHANGED_CAPTION, item.before is not None and item.before.caption != caption_digest(item.record))
            caption = steady(item.caption, one.config.captions)
            wanted.append(WantedText(text_key(caption, encoder), caption, why))
        if can_be_empty(one.config.captions):
            wanted.append(WantedText(text_key("", encoder), "", NEW))
    return wanted


def _why(item: Item, changed: str, is_changed: bool) -> str:
    """Why an entry does not exist, if it does not."""
    if item.before is None:
        return NEW
    return changed if is_changed else OTHER
