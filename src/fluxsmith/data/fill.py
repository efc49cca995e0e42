"""Fills the caches: encodes what is missing, bucket by bucket, and says how much of the rest was still valid and why not.

A picture that was edited, a caption that was rewritten and an encoder that was exchanged each give another key, so old entries are
never used by mistake; the counts tell the user which of these it was.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fluxsmith.data.cache import Store
from fluxsmith.data.scan import Finding
from fluxsmith.data.sources.base import shown
from fluxsmith.data.types import Size, TextStates
from fluxsmith.errors import ConfigError, DataError, NumericError, Problem
from fluxsmith.events import Bus, CacheProgress

VALID, NEW, CHANGED_PICTURE, CHANGED_CAPTION, OTHER = (
    "valid",
    "new",
    "stale (picture changed)",
    "stale (caption changed)",
    "not yet made with these settings",
)


class Wanted(NamedTuple):
    """One latents entry that has to exist."""

    key: str
    dataset: int
    record: int  # position among the dataset's items
    bucket: Size
    name: str  # the picture, for messages
    why: str  # NEW, CHANGED_PICTURE ... if it does not exist
    read: Callable[[], Tensor]  # (3, H, W) in [-1, 1]; raises DataError


class WantedText(NamedTuple):
    """One text entry that has to exist."""

    key: str
    caption: str
    why: str


W = TypeVar("W", Wanted, WantedText)


class Tally(NamedTuple):
    """Outcome of one fill: counts by reason, and pictures that went bad in between, by (dataset, record)."""

    counts: Counter[str]
    failed: dict[tuple[int, int], Finding]

    def summary(self, what: str) -> str:
        """`latents cache: 118 valid, 2 stale (picture changed), rebuilt`."""
        parts = [
            f"{self.counts[reason]} {reason}" for reason in (VALID, CHANGED_PICTURE, CHANGED_CAPTION, OTHER, NEW) if self.counts[reason]
        ]
        made = sum(self.counts.values()) - self.counts[VALID]
        return f"{what} cache: {', '.join(parts) or 'empty'}" + (", rebuilt" if made - self.counts[NEW] else "")


def fill_latents(store: Store, wanted: Sequence[Wanted], encode: Callable[[Tensor], Tensor] | None, *, batch_size: int, bus: Bus) -> Tally:
    """Encode every wanted picture that the store lacks. Raises NumericError when latents are not finite."""
    missing = _first_of_each(wanted, store)
    counts = _count([(one.key, one.why) for one in wanted], store)
    failed: dict[tuple[int, int], Finding] = {}
    if missing and encode is None:
        raise ConfigError(
            f"{len(missing)} pictures are not in the latents cache, and there is no autoencoder to encode them", fix="give model.ae"
        )
    done = 0
    try:
        for group in _groups(missing, batch_size):
            done += len(group)
            whole = [(one, pixels) for one in group if (pixels := _read(one, failed)) is not None]
            if whole and encode is not None:
                _encode_group(store, whole, encode)
            bus.send(CacheProgress("latents", done, len(missing)))
    finally:
        store.flush()  # what is encoded is kept when the rest fails or is interrupted
    return Tally(counts, failed)


def _encode_group(store: Store, whole: Sequence[tuple[Wanted, Tensor]], encode: Callable[[Tensor], Tensor]) -> None:
    latents = encode(torch.stack([pixels for _, pixels in whole]))
    for (one, _), single in zip(whole, latents, strict=True):
        if not bool(torch.isfinite(single).all()):
            raise NumericError(
                "latents are not finite",
                where=one.name,
                why="the autoencoder overflowed on this picture",
                fix="run the autoencoder in fp32 or bf16",
            )
        store.put(one.key, {"latents": single.detach().to("cpu").clone()})


def _read(one: Wanted, failed: dict[tuple[int, int], Finding]) -> Tensor | None:
    """The pixels, or None when the picture went bad since the scan."""
    if (one.dataset, one.record) in failed:
        return None
    try:
        return one.read()
    except DataError as error:
        failed[one.dataset, one.record] = Finding("skipped", one.name, error.problems[0])
    except OSError as error:
        why = error.strerror or str(error)
        failed[one.dataset, one.record] = Finding(
            "skipped", one.name, Problem("picture cannot be read", shown(one.name), why, "check the file")
        )
    return None


def _groups(missing: Sequence[Wanted], batch_size: int) -> Iterator[list[Wanted]]:
    """Groups of one bucket, at most `batch_size` long."""
    by_bucket: dict[Size, list[Wanted]] = {}
    for one in missing:
        by_bucket.setdefault(one.bucket, []).append(one)
    for same in by_bucket.values():
        for start in range(0, len(same), batch_size):
            yield same[start : start + batch_size]


def fill_text(
    store: Store, wanted: Sequence[WantedText], encode: Callable[[list[str]], TextStates] | None, *, batch_size: int, bus: Bus
) -> Tally:
    """Encode every wanted caption that the store lacks; rows are kept at the length the encoder gives."""
    missing = _first_of_each(wanted, store)
    counts = _count([(one.key, one.why) for one in wanted], store)
    if missing and encode is None:
        raise ConfigError(
            f"{len(missing)} captions are not in the text cache, and there are no text encoders to encode them",
            fix="give model.clip_l and model.t5xxl",
        )
    try:
        for start in range(0, len(missing), batch_size):
            group = missing[start : start + batch_size]
            bus.send(CacheProgress("text", start, len(missing)))
            if encode is not None:
                _keep_text(store, group, encode([one.caption for one in group]))
        if missing:
            bus.send(CacheProgress("text", len(missing), len(missing)))
    finally:
        store.flush()
    return Tally(counts, {})


def _keep_text(store: Store, group: Sequence[WantedText], states: TextStates) -> None:
    for place, one in enumerate(group):
        if not bool(torch.isfinite(states.txt[place]).all()) or not bool(torch.isfinite(states.pooled[place]).all()):
            raise NumericError("text states are not finite", where=repr(one.caption[:80]), fix="run the text encoders in fp32 or bf16")
        row = {"txt": states.txt[place], "pooled": states.pooled[place], "mask": states.mask[place]}
        store.put(one.key, {name: tensor.detach().to("cpu").clone() for name, tensor in row.items()})


def fill_masks(store: Store, wanted: Sequence[Wanted]) -> Tally:
    """Keep every wanted mask that the store lacks beside the latents; a mask needs no encoder."""
    failed: dict[tuple[int, int], Finding] = {}
    counts = _count([(one.key, one.why) for one in wanted], store)
    try:
        for one in _first_of_each(wanted, store):
            mask = _read(one, failed)
            if mask is not None:
                store.put(one.key, {"mask": mask})
    finally:
        store.flush()
    return Tally(counts, failed)


def _first_of_each(wanted: Sequence[W], store: Store) -> list[W]:
    """What the store lacks, each key once."""
    return list({one.key: one for one in reversed(wanted) if one.key not in store}.values())[::-1]


def _count(wanted: Sequence[tuple[str, str]], store: Store) -> Counter[str]:
    """Distinct keys by state; a key is valid or has the reason of its first use."""
    reasons = dict(reversed(wanted))
    return Counter(VALID if key in store else why for key, why in reasons.items())
