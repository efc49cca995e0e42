"""From a `BatchSpec` to a `Batch`: each use's picture or latents, mask, condition picture, caption and weight, as its own dataset asks.

A `Loader` keeps no state but which pictures it complained about, so batches may be loaded in any order and in any thread.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from fluxsmith.config.dataset import DatasetConfig
from fluxsmith.data.batching import VALIDATION_EPOCH
from fluxsmith.data.cache import Entry, Stores, latents_key, mask_key, text_key
from fluxsmith.data.captions import render, steady
from fluxsmith.data.companions import read_condition, read_mask
from fluxsmith.data.plans import is_flipped, kept_plan, live_plan, still_plan
from fluxsmith.data.scan import Item, ScannedSet
from fluxsmith.data.sources.base import shown
from fluxsmith.data.transforms import PixelPlan, pixels
from fluxsmith.data.types import Batch, BatchSpec, Encoders, Size, TextStates, Use
from fluxsmith.errors import DataError, StorageError
from fluxsmith.events import Bus, Warned
from fluxsmith.io.images import read_image
from fluxsmith.randomness import python_random

RETRY_SECONDS = (1.0, 9.0, 20.0)  # waits for a data folder that went away (a network mount)


class _Sample(NamedTuple):
    """One use with what was read for it."""

    use: Use
    one: ScannedSet
    item: Item
    image: Tensor  # latents (16, h, w) or pixels (3, H, W)
    mask: Tensor | None  # (1, h, w)
    condition: Tensor | None  # (3, H, W)


@dataclass
class Loader:
    """Loads batches of these datasets."""

    sets: Sequence[ScannedSet]
    stores: Stores
    encoders: Encoders
    seed: int
    bus: Bus
    _complained: set[str] = field(default_factory=set, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def load(self, spec: BatchSpec, *, step: int, total_steps: int | None) -> Batch:
        """See `PreparedData.load`."""
        samples = [sample for use in spec.uses if (sample := self._sample(use, is_trained=spec.epoch != VALIDATION_EPOCH)) is not None]
        if not samples:
            names = ", ".join(shown(self.sets[use.dataset].items[use.record].record.path) for use in spec.uses)
            raise DataError("no picture of this batch can be read any more", where=names, fix="put the pictures back, then start again")
        captions = tuple(self._caption(sample, epoch=spec.epoch, steps=(step, total_steps)) for sample in samples)
        stacked = torch.stack([sample.image for sample in samples])
        cached = self.stores.latents is not None
        configs = [sample.one.config for sample in samples]
        return Batch(
            keys=tuple(sample.item.record.key for sample in samples),
            indices=tuple(sample.use.number for sample in samples),
            captions=captions,
            latents=stacked if cached else None,
            pixels=None if cached else stacked,
            text=self._text(captions),
            weights=torch.tensor([float(config.weight) for config in configs]),
            mask=_masks(samples, spec.bucket),
            condition=_conditions(samples),
            preserve=torch.tensor([config.preserve for config in configs]) if any(config.preserve for config in configs) else None,
        )

    def _caption(self, sample: _Sample, *, epoch: int, steps: tuple[int, int | None]) -> str:
        captions = sample.one.config.captions
        if epoch == VALIDATION_EPOCH:
            return steady(sample.item.caption, captions)
        step, total = steps
        rng = python_random(self.seed, "caption", sample.use.number)
        return render(sample.item.caption, captions, rng=rng, epoch=epoch, step=step, total_steps=total or 0)

    def _text(self, captions: Sequence[str]) -> TextStates | None:
        store = self.stores.text
        if store is None:
            return None
        entries: list[Entry] = [store.get(text_key(caption, self.encoders.text_digest)) for caption in captions]
        return TextStates(*(torch.stack([entry[name] for entry in entries]) for name in TextStates._fields))

    def _sample(self, use: Use, *, is_trained: bool) -> _Sample | None:
        """What the use needs; None when one of its files cannot be read any more (a cache that cannot be read ends the run)."""
        one = self.sets[use.dataset]
        item = one.items[use.record]
        plan = self._plan(one, item, use, is_trained=is_trained)
        kept = self._kept(one, item, plan)
        try:
            image, mask = kept or _read(one, item, plan)
            condition = _condition(one, item, plan)
        except DataError as error:
            self._complain(item, error)
            return None
        return _Sample(use, one, item, image, mask.flip(-1) if mask is not None and plan.flipped else mask, condition)

    def _plan(self, one: ScannedSet, item: Item, use: Use, *, is_trained: bool) -> PixelPlan:
        if not is_trained:
            return still_plan(one, item)
        if self.stores.latents is not None:
            return kept_plan(one, item, seed=self.seed, flipped=is_flipped(one, use, self.seed))
        return live_plan(one, item, use, seed=self.seed)

    def _kept(self, one: ScannedSet, item: Item, plan: PixelPlan) -> tuple[Tensor, Tensor | None] | None:
        """Latents and mask (not mirrored) from the cache; None when nothing is cached."""
        store = self.stores.latents
        if store is None:
            return None
        latents = store.get(latents_key(item.digest, plan, one.config.background, self.encoders.latents_digest))["latents"]
        mask = item.mask
        return latents, None if mask is None else store.get(mask_key(mask.digest, plan.placement, is_alpha=mask.is_alpha))["mask"]

    def _complain(self, item: Item, error: DataError) -> None:
        with self._lock:
            is_first = item.record.key not in self._complained
            self._complained.add(item.record.key)
        if is_first:
            self.bus.send(Warned(f"left out from now on: {error.problems[0]}"))


def _read(one: ScannedSet, item: Item, plan: PixelPlan) -> tuple[Tensor, Tensor | None]:
    """Pixels and mask (not mirrored: buckets are whole latents, so a mask mirrors as well as its picture)."""
    mask = item.mask
    image = patient(item.record.path, lambda: picture_pixels(item, one.config, plan))
    return image, None if mask is None else patient(mask.path, lambda: read_mask(mask, plan.placement, one.config))


def _masks(samples: Sequence[_Sample], bucket: Size) -> Tensor | None:
    """(B, 1, h, w); a picture without a mask is learned whole. None when no dataset of the batch has masks."""
    if not any(sample.one.config.alpha_mask or sample.one.config.mask_dir for sample in samples):
        return None
    whole = torch.ones(1, bucket.height // 8, bucket.width // 8)
    return torch.stack([whole if sample.mask is None else sample.mask for sample in samples])


def _conditions(samples: Sequence[_Sample]) -> Tensor | None:
    """(B, 3, H, W) where all samples have one (the datasets of a group all do or none does)."""
    conditions = [sample.condition for sample in samples if sample.condition is not None]
    return torch.stack(conditions) if len(conditions) == len(samples) else None


def _condition(one: ScannedSet, item: Item, plan: PixelPlan) -> Tensor | None:
    condition = item.condition
    if condition is None:
        return None
    return patient(condition.path, lambda: read_condition(condition, plan.placement, one.config, flipped=plan.flipped))


def picture_pixels(item: Item, config: DatasetConfig, plan: PixelPlan) -> Tensor:
    """(3, H, W) of a picture. Raises DataError when it is not the one that was scanned any more."""
    image = read_image(item.record.path, max_pixels=config.max_pixels, background=config.background).image
    if image.size != item.size:
        raise DataError("picture changed during the run", where=shown(item.record.path), fix="start the command again")
    return pixels(image, plan)


def patient(path: Path, read: Callable[[], Tensor]) -> Tensor:
    """What `read` reads from `path`, waiting for a folder that went away. Raises StorageError when it stays away."""
    for wait in RETRY_SECONDS:
        try:
            return read()
        except DataError:
            if path.parent.is_dir():
                raise
            time.sleep(wait)
    folder = shown(path.parent)
    raise StorageError(
        "data folder has gone", where=folder, why="a network mount?", fix="mount it again, then start the same command again"
    )
