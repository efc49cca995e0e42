"""Datasets made ready for a run: scanned, cached, cut into batches, and loaded batch by batch.

`data = prepare(config.data, cache=config.cache, seed=42, encoders=encoders, bus=bus, run_dir=run_dir).hold_out(config.validation)`
then `data.load(spec, step=step)` for each `spec` of `data.batches(epoch)`. Every random choice is keyed by the use, so loading can
happen in any order, in any thread, and again after a restart.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxsmith.config.data_rules import data_findings
from fluxsmith.config.dataset import DatasetConfig
from fluxsmith.config.schema import CacheConfig, ValidationConfig
from fluxsmith.config.sections import dotted
from fluxsmith.data.batching import Member, epoch_batches, held_out_batches, largest, uses_per_epoch
from fluxsmith.data.cache import MemoryStore, PackStore, Store, Stores, key_of
from fluxsmith.data.captions import varying
from fluxsmith.data.checks import ScanReport, report_on
from fluxsmith.data.fill import Tally, fill_latents, fill_masks, fill_text
from fluxsmith.data.index import PictureIndex
from fluxsmith.data.loading import Loader
from fluxsmith.data.plans import moves
from fluxsmith.data.scan import ScannedSet, scan
from fluxsmith.data.shape import rows, shaping
from fluxsmith.data.split import held_out_of, share_of
from fluxsmith.data.types import Batch, BatchSpec, Encoders
from fluxsmith.data.wanted import wanted_latents, wanted_masks, wanted_text
from fluxsmith.errors import ConfigError, DataError, Problem
from fluxsmith.events import Bus, CacheProgress, PhaseStarted, Warned


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
    found = data_findings(list(enumerate(datasets)), cache)
    problems = [Problem(finding.what, dotted(finding.key), finding.why, finding.fix) for finding in found]
    for place, config in enumerate(datasets):
        options = varying(config.captions)
        if options and cache.text != "off":
            what = f"{' and '.join(options)}: captions differ from use to use and cannot be cached"
            problems.append(Problem(what, f"data.{place}", "", f'set cache.text = "off", or switch {" and ".join(options)} off'))
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
        self._encode_batch = 1  # pictures encoded at a time, as `fill` was told
        self._loader = Loader(self.sets, stores, encoders, seed, bus)
        self.digest = self._digest()

    def hold_out(self, validation: ValidationConfig) -> "PreparedData":
        """The same data with a share of the pictures of each dataset kept from training (regularisation sets give none).

        The share is `validation.share`, or the dataset's own. Raises DataError when nothing is left to train.
        """
        other = self._copy(self.sets)
        other.validation, other._held = validation, held_out_of(self.sets, validation)
        other.digest = other._digest()
        other._check_left()
        other._fill_still()
        return other

    def _check_left(self) -> None:
        """Raises DataError when every picture is held out; warns about a dataset whose pictures are all copies of held-out ones."""
        if not self._held:
            return
        left = {member.dataset: len(member.records) for member in self._members(held=False)}
        trained = [one for one in self.sets if not one.config.regularisation]
        if not any(left[one.index] for one in trained):
            shares = ", ".join(f"{one.name} {share_of(one, self.validation):.0%}" for one in trained)
            fix = "lower validation_share (or validation.share), or add pictures that are not copies of the held-out ones"
            raise DataError("validation leaves nothing to train", where="data", why=f"held out: {shares}", fix=fix)
        for one in trained:
            if not left[one.index] and share_of(one, self.validation) < 1:
                why = "they are copies of pictures that other datasets hold out"
                self._bus.send(
                    Warned(str(Problem("nothing of this dataset is trained", one.name, why, "lower the other validation_share")))
                )

    def _copy(self, sets: Sequence[ScannedSet]) -> "PreparedData":
        other = PreparedData(sets, self.report, stores=self._stores, encoders=self._encoders, seed=self._seed, bus=self._bus)
        other.cache_summary, other._encode_batch = self.cache_summary, self._encode_batch
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
            sets.append(replace(one, items=items, findings=one.findings + new))
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
            if held and not share_of(one, self.validation):
                continue
            records = tuple(place for place, item in enumerate(one.items) if (item.digest in self._held) == held)
            buckets = tuple(one.items[place].placement.bucket for place in records)
            config = one.config
            members.append(Member(one.index, records, buckets, config.batch_size, config.repeats, config.regularisation, config.group))
        return members

    def _digest(self) -> str:
        return key_of(sets=[(shaping(one.config), rows(one.items)) for one in self.sets], held=sorted(self._held))

    # caches ----------------------------------------------------------------------------------------------------------

    def fill(self, batch_size: int) -> list[Tally]:
        """Encode what the caches lack, and put the outcome into `cache_summary`."""
        self._encode_batch = batch_size
        tallies: list[Tally] = []
        lines = []
        encoders, stores = self._encoders, self._stores
        if stores.latents is not None:
            wanted = wanted_latents(self.sets, encoder=encoders.latents_digest, seed=self._seed)
            tallies.append(fill_latents(stores.latents, wanted, encoders.latents, batch_size=batch_size, bus=self._bus))
            lines.append(tallies[-1].summary("latents"))
            masks = wanted_masks(self.sets, seed=self._seed)
            if masks:
                tallies.append(fill_masks(stores.latents, masks))
                lines.append(tallies[-1].summary("masks"))
        if stores.text is not None:
            captions = wanted_text(self.sets, encoder=encoders.text_digest)
            tallies.append(fill_text(stores.text, captions, encoders.text, batch_size=batch_size, bus=self._bus))
            lines.append(tallies[-1].summary("text"))
        for line in lines:
            self._bus.send(PhaseStarted("cache", line))
        self.cache_summary = tuple(lines)
        return tallies

    def _fill_still(self) -> None:
        """Encode held-out pictures whose crop is drawn while training: they are measured as they are."""
        store = self._stores.latents
        if store is None or not self._held or not any(moves(one) for one in self.sets):
            return
        wanted = wanted_latents(self.sets, encoder=self._encoders.latents_digest, seed=self._seed, held=self._held)
        tally = fill_latents(store, wanted, self._encoders.latents, batch_size=self._encode_batch, bus=self._bus)
        failed = tally.failed | fill_masks(store, wanted_masks(self.sets, seed=self._seed, held=self._held)).failed
        if failed:
            problems = tuple(finding.problem for finding in failed.values())
            raise DataError(str(problems[0]), problems=problems)

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
        return self._loader.load(spec, step=step, total_steps=total_steps)
