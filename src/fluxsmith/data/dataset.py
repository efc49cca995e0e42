"""Datasets made ready for a run: scanned, cached, cut into batches, and loaded batch by batch.

`data = prepare(config.data, cache=config.cache, seed=42, encoders=encoders, bus=bus, run_dir=run_dir).hold_out(config.validation)`
then `data.load(spec, step=step)` for each `spec` of `data.batches(epoch)`. Every random choice is keyed by the use, so loading can
happen in any order, in any thread, and again after a restart.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxsmith.config.dataset import DatasetConfig
from fluxsmith.config.schema import CacheConfig, ValidationConfig
from fluxsmith.data.batching import (
    VALIDATION_EPOCH,
    Member,
    epoch_batches,
    held_out,
    held_out_batches,
    largest,
    uses_per_epoch,
)
from fluxsmith.data.cache import Entry, MemoryStore, PackStore, Store, key_of, latents_key, text_key
from fluxsmith.data.captions import can_be_empty, render, steady, varying
from fluxsmith.data.checks import ScanReport, report_on
from fluxsmith.data.fill import CHANGED_CAPTION, CHANGED_PICTURE, NEW, OTHER, Tally, Wanted, WantedText, fill_latents, fill_text
from fluxsmith.data.index import PictureIndex
from fluxsmith.data.scan import Item, ScannedSet, caption_digest, scan
from fluxsmith.data.sources.base import shown
from fluxsmith.data.transforms import Jitter, PixelPlan, filter_for, pixels, random_crop, random_jitter
from fluxsmith.data.types import Batch, BatchSpec, Encoders, TextStates, Use
from fluxsmith.errors import ConfigError, DataError, Problem, StorageError
from fluxsmith.events import Bus, CacheProgress, PhaseStarted, Warned
from fluxsmith.io.images import read_image
from fluxsmith.randomness import python_random

RETRY_SECONDS = (1.0, 9.0, 20.0)  # waits for a data folder that went away (a network mount)
NOT_SHAPING = {"type", "path", "name", "recursive", "max_pixels", "max_skipped"}  # options that do not change what a picture becomes


class Stores(NamedTuple):
    """Where encoded pictures and captions are; None is off."""

    latents: Store | None
    text: Store | None


def prepare(
    datasets: Sequence[DatasetConfig], *, cache: CacheConfig, seed: int, encoders: Encoders, bus: Bus, run_dir: Path
) -> "PreparedData":
    """Scan all datasets, say what is wrong, and bring the caches up to date.

    Args:
        datasets: one `Config` of a source each.
        cache: where encoded things are kept; the folder is `cache.dir`, or `cache/` in `run_dir`.
        seed: of the run; keys every draw.
        encoders: called only for what is not cached, so they may load their models on the first call; None with an empty digest
            means that this is not wanted at all, None with a digest that the cache must be complete.
        bus: told about progress and warnings.
        run_dir: the run folder.

    Raises ConfigError for options that exclude each other, DataError (with all problems) when the data cannot be used.
    """
    cache = _wanted_caches(cache, encoders)
    _check_options(datasets, cache)
    folder = cache.dir or run_dir / "cache"
    index = PictureIndex(folder / "index.json" if "disk" in (cache.latents, cache.text) else None)
    bus.send(PhaseStarted("scan", f"{len(datasets)} data sets"))
    sets = scan(datasets, index=index, verify=cache.verify, progress=lambda done, total: bus.send(CacheProgress("scan", done, total)))
    report = report_on(sets, token_counts=encoders.token_counts)
    for line in report.warnings():
        bus.send(Warned(line))
    report.raise_if_unusable()
    stores = Stores(_store(cache.latents, folder / "latents", index, cache, bus), _store(cache.text, folder / "text", index, cache, bus))
    data = PreparedData(sets, report, stores=stores, encoders=encoders, seed=seed, bus=bus)
    try:
        tallies = data.fill(cache.batch_size)
    finally:
        index.save()  # a crash while encoding does not cost the scan
    return data.without(tallies)


def _wanted_caches(cache: CacheConfig, encoders: Encoders) -> CacheConfig:
    """What has neither an encoder nor the digest of one is not wanted, so its cache is off."""
    unwanted: dict[str, Any] = {}
    if encoders.latents is None and not encoders.latents_digest:
        unwanted["latents"] = "off"
    if encoders.text is None and not encoders.text_digest:
        unwanted["text"] = "off"
    return cache.model_copy(update=unwanted)


def _check_options(datasets: Sequence[DatasetConfig], cache: CacheConfig) -> None:
    problems = []
    for place, config in enumerate(datasets):
        options = varying(config.captions)
        if options and cache.text != "off":
            what = f"{' and '.join(options)}: captions differ from use to use and cannot be cached"
            problems.append(Problem(what, f"data[{place}]", "", f'set cache.text = "off", or switch {" and ".join(options)} off'))
        if config.color_jitter and cache.latents != "off":
            what = "color_jitter: pictures differ from use to use and cannot be cached"
            problems.append(Problem(what, f"data[{place}]", "", 'set cache.latents = "off", or color_jitter = 0'))
    if datasets and all(config.regularisation for config in datasets):
        problems.append(
            Problem("all data sets are regularisation pictures", "data", "", "set regularisation = false on what is to be learned")
        )
    if problems:
        raise ConfigError(str(problems[0]), problems=tuple(problems))


def _store(kind: str, folder: Path, index: PictureIndex, cache: CacheConfig, bus: Bus) -> Store | None:
    if kind == "off":
        return None
    if kind == "memory":
        return MemoryStore()
    store = PackStore(folder, stamps=index.packs, verify=cache.verify)
    if store.broken:
        names = ", ".join(f"{path.name} ({why})" for path, why in store.broken[:3])
        bus.send(Warned(f"{len(store.broken)} damaged cache files were set aside and are rebuilt: {names}"))
    return store


class PreparedData:
    """What a run trains on. Made by `prepare`; `hold_out` gives a copy with a validation part.

    Attributes:
        report: what the scan found.
        digest: names pictures, captions and every option that shapes a sample; equal digest, equal data.
        cache_summary: one line a cache, for the log.
    """

    def __init__(self, sets: Sequence[ScannedSet], report: ScanReport, *, stores: Stores, encoders: Encoders, seed: int, bus: Bus) -> None:
        self.sets = tuple(sets)
        self.report = report
        self.cache_summary: tuple[str, ...] = ()
        self.validation = ValidationConfig()
        self._stores = stores
        self._encoders = encoders
        self._seed = seed
        self._bus = bus
        self._held: frozenset[str] = frozenset()
        self._complained: set[str] = set()
        self._lock = Lock()
        self.digest = self._digest()

    def hold_out(self, validation: ValidationConfig) -> "PreparedData":
        """The same data with `validation.share` of the pictures of each dataset kept from training (regularisation sets give none)."""
        chosen = held_out(
            [[item.digest for item in one.items] for one in self.sets if not one.config.regularisation],
            share=validation.share,
            seed=validation.seed,
        )
        other = self._copy(self.sets)
        other.validation, other._held = validation, frozenset(chosen)
        other.digest = other._digest()
        return other

    def _copy(self, sets: Sequence[ScannedSet]) -> "PreparedData":
        other = PreparedData(sets, self.report, stores=self._stores, encoders=self._encoders, seed=self._seed, bus=self._bus)
        other.cache_summary = self.cache_summary
        return other

    def without(self, tallies: Sequence[Tally]) -> "PreparedData":
        """The same data less pictures that went bad between scan and encoding. Raises DataError when too few are left."""
        failed = {place: finding for tally in tallies for place, finding in tally.failed.items()}
        if not failed:
            return self
        sets = []
        for one in self.sets:
            items = tuple(item for place, item in enumerate(one.items) if (one.index, place) not in failed)
            new = tuple(finding for (index, _), finding in sorted(failed.items()) if index == one.index)
            sets.append(ScannedSet(one.index, one.name, one.config, one.rule, one.found, items, one.findings + new))
        other = self._copy(sets)
        other.report = report_on(sets, token_counts=self._encoders.token_counts)
        for finding in failed.values():
            self._bus.send(Warned(f"skipped: {finding.problem}"))
        other.report.raise_if_unusable()
        return other

    # batches ---------------------------------------------------------------------------------------------------------

    @property
    def num_pictures(self) -> int:
        """Pictures trained, each once."""
        return sum(len(member.records) for member in self._members(held=False))

    @property
    def uses_per_epoch(self) -> int:
        """Samples in an epoch."""
        return uses_per_epoch(self._members(held=False))

    def batches(self, epoch: int) -> list[BatchSpec]:
        """The micro-batches of an epoch, in order; see `batching.epoch_batches`."""
        return epoch_batches(self._members(held=False), seed=self._seed, epoch=epoch)

    def validation_batches(self) -> list[BatchSpec]:
        """The held-out micro-batches (epoch -1: never mirrored, dropped or shuffled), at most `validation.max_batches`."""
        return held_out_batches(self._members(held=True))[: self.validation.max_batches]

    def largest(self) -> BatchSpec:
        """The batch of epoch 0 that needs the most memory."""
        return largest(self.batches(0))

    @property
    def batch_sizes(self) -> list[int]:
        """Of each dataset."""
        return [one.config.batch_size for one in self.sets]

    def _members(self, *, held: bool) -> list[Member]:
        members = []
        for one in self.sets:
            if held and one.config.regularisation:
                continue
            records = tuple(place for place, item in enumerate(one.items) if (item.digest in self._held) == held)
            buckets = tuple(one.items[place].placement.bucket for place in records)
            members.append(Member(one.index, records, buckets, one.config.batch_size, one.config.repeats, one.config.regularisation))
        return members

    def _digest(self) -> str:
        sets = []
        for one in self.sets:
            settings = {key: value for key, value in one.config.model_dump(mode="json").items() if key not in NOT_SHAPING}
            rows = [(item.record.key.encode("utf-8", "surrogateescape").hex(), item.digest, item.size, item.caption) for item in one.items]
            sets.append((settings, rows))
        return key_of(sets=sets, held=sorted(self._held))

    # caches ----------------------------------------------------------------------------------------------------------

    def fill(self, batch_size: int) -> list[Tally]:
        """Encode what the caches lack, and put the outcome into `cache_summary`."""
        tallies: list[Tally] = []
        lines = []
        if self._stores.latents is not None:
            tallies.append(
                fill_latents(self._stores.latents, self._wanted_latents(), self._encoders.latents, batch_size=batch_size, bus=self._bus)
            )
            lines.append(tallies[-1].summary("latents"))
        if self._stores.text is not None:
            tallies.append(fill_text(self._stores.text, self._wanted_text(), self._encoders.text, batch_size=batch_size, bus=self._bus))
            lines.append(tallies[-1].summary("text"))
        for line in lines:
            self._bus.send(PhaseStarted("cache", line))
        self.cache_summary = tuple(lines)
        return tallies

    def _wanted_latents(self) -> list[Wanted]:
        wanted = []
        for one in self.sets:
            for place, item in enumerate(one.items):
                why = _why(item, CHANGED_PICTURE, item.before is not None and item.before.digest != item.digest)
                for flipped in (False, True) if one.config.flip else (False,):
                    plan = self._cached_plan(one, item, flipped=flipped)
                    key = latents_key(item.digest, plan, one.config.background, self._encoders.latents_digest)

                    def read(item: Item = item, one: ScannedSet = one, plan: PixelPlan = plan) -> Tensor:
                        return _pixels(item, one.config, plan)

                    wanted.append(Wanted(key, one.index, place, plan.placement.bucket, item.record.key, why, read))
        return wanted

    def _wanted_text(self) -> list[WantedText]:
        wanted = []
        for one in self.sets:
            for item in one.items:
                why = _why(item, CHANGED_CAPTION, item.before is not None and item.before.caption != caption_digest(item.record))
                caption = steady(item.caption, one.config.captions)
                wanted.append(WantedText(text_key(caption, self._encoders.text_digest), caption, why))
            if can_be_empty(one.config.captions):
                wanted.append(WantedText(text_key("", self._encoders.text_digest), "", NEW))
        return wanted

    def _cached_plan(self, one: ScannedSet, item: Item, *, flipped: bool) -> PixelPlan:
        """What is encoded for a picture: a random crop is drawn once, by content."""
        placement = item.placement
        if one.config.crop == "random":
            placement = random_crop(placement, python_random(self._seed, "crop", item.digest))
        return PixelPlan(placement, filter_for(item.size, placement.resized, one.config.interpolation), flipped)

    # loading ---------------------------------------------------------------------------------------------------------

    def load(self, spec: BatchSpec, *, step: int, total_steps: int | None = None) -> Batch:
        """The samples of a batch, on the host. Safe from several threads.

        Args:
            spec: one of `batches` or `validation_batches`.
            step: optimizer step, counted from 0 (tag warm-up).
            total_steps: length of the run; without it a tag warm-up given as a share counts as over.

        A picture that went bad since the scan is left out with one warning; raises DataError when none is left, and StorageError
        when the data folder itself has gone for more than half a minute.
        """
        one = self.sets[spec.dataset]
        samples: list[tuple[Use, Item, Tensor]] = []
        for use in spec.uses:
            item = one.items[use.record]
            image = self._image(one, item, use, spec.epoch)
            if image is not None:
                samples.append((use, item, image))
        if not samples:
            names = ", ".join(shown(one.items[use.record].record.path) for use in spec.uses)
            raise DataError("no picture of this batch can be read any more", where=names, fix="put the pictures back, then start again")
        captions = tuple(self._caption(one, item, use, epoch=spec.epoch, steps=(step, total_steps)) for use, item, _ in samples)
        stacked = torch.stack([image for _, _, image in samples])
        cached = self._stores.latents is not None
        return Batch(
            keys=tuple(item.record.key for _, item, _ in samples),
            indices=tuple(use.number for use, _, _ in samples),
            captions=captions,
            latents=stacked if cached else None,
            pixels=None if cached else stacked,
            text=self._text(captions),
            weights=torch.full((len(samples),), float(one.config.weight)),
        )

    def _caption(self, one: ScannedSet, item: Item, use: Use, *, epoch: int, steps: tuple[int, int | None]) -> str:
        captions = one.config.captions
        if epoch == VALIDATION_EPOCH:
            return steady(item.caption, captions)
        step, total = steps
        rng = python_random(self._seed, "caption", use.number)
        return render(item.caption, captions, rng=rng, epoch=epoch, step=step, total_steps=total or 0)

    def _text(self, captions: Sequence[str]) -> TextStates | None:
        store = self._stores.text
        if store is None:
            return None
        entries: list[Entry] = [store.get(text_key(caption, self._encoders.text_digest)) for caption in captions]
        return TextStates(*(torch.stack([entry[name] for entry in entries]) for name in TextStates._fields))

    def _image(self, one: ScannedSet, item: Item, use: Use, epoch: int) -> Tensor | None:
        """Latents from the cache, else pixels; None when the picture cannot be read any more."""
        is_trained = epoch != VALIDATION_EPOCH
        flipped = one.config.flip and is_trained and python_random(self._seed, "flip", use.number).random() < 0.5
        plan = self._cached_plan(one, item, flipped=flipped)
        if self._stores.latents is not None:
            return self._stores.latents.get(latents_key(item.digest, plan, one.config.background, self._encoders.latents_digest))["latents"]
        if is_trained:
            if one.config.crop == "random":
                plan = plan._replace(placement=random_crop(item.placement, python_random(self._seed, "crop", use.number)))
            jitter = random_jitter(one.config.color_jitter, python_random(self._seed, "jitter", use.number))
            plan = plan._replace(jitter=jitter if one.config.color_jitter else Jitter())
        try:
            return _patient_pixels(item, one.config, plan)
        except DataError as error:
            self._complain(item, error)
            return None

    def _complain(self, item: Item, error: DataError) -> None:
        with self._lock:
            is_first = item.record.key not in self._complained
            self._complained.add(item.record.key)
        if is_first:
            self._bus.send(Warned(f"left out from now on: {error.problems[0]}"))


def _why(item: Item, changed: str, is_changed: bool) -> str:
    """Why an entry does not exist, if it does not."""
    if item.before is None:
        return NEW
    return changed if is_changed else OTHER


def _pixels(item: Item, config: DatasetConfig, plan: PixelPlan) -> Tensor:
    """(3, H, W) of a picture. Raises DataError when it is not the one that was scanned any more."""
    image = read_image(item.record.path, max_pixels=config.max_pixels, background=config.background).image
    if image.size != item.size:
        raise DataError("picture changed during the run", where=shown(item.record.path), fix="start the command again")
    return pixels(image, plan)


def _patient_pixels(item: Item, config: DatasetConfig, plan: PixelPlan) -> Tensor:
    """`_pixels`, waiting for a folder that went away. Raises StorageError when it stays away."""
    for wait in RETRY_SECONDS:
        try:
            return _pixels(item, config, plan)
        except DataError:
            if item.record.path.parent.is_dir():
                raise
            time.sleep(wait)
    folder = shown(item.record.path.parent)
    raise StorageError(
        "data folder has gone", where=folder, why="a network mount?", fix="mount it again, then start the same command again"
    )
