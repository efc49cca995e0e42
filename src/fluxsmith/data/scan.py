"""From dataset options to usable items, with everything that is wrong found in one go and before anything is encoded.

Every picture is decoded once (or known from an earlier start), hashed and given its bucket; nothing here needs a model.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from fluxsmith.config.choice import realise
from fluxsmith.config.dataset import DatasetConfig
from fluxsmith.data.buckets import BucketRule, Placement, rule_for
from fluxsmith.data.index import Known, PictureIndex, stamp_of
from fluxsmith.data.sources.base import Listing, Source, shown
from fluxsmith.data.types import Record, Size
from fluxsmith.errors import DataError, Problem
from fluxsmith.io.images import read_image

MAX_THREADS = 4  # a decoded picture can take 200 MB
Kind = Literal["error", "skipped", "left out", "warning"]
Progress = Callable[[int, int], None]


class Finding(NamedTuple):
    """One remark of the scan. error: the run must not start; skipped: unusable; left out: as the options ask; warning: used."""

    kind: Kind
    key: str  # of the picture; empty for the whole dataset
    problem: Problem


class Item(NamedTuple):
    """A usable picture."""

    record: Record
    digest: str  # SHA-256 of the file
    size: Size  # upright, pixels
    placement: Placement  # with the centre crop
    caption: str  # the file's text, or what stands for it
    before: Known | None = None  # what was known of this file at the last start


@dataclass(frozen=True)
class ScannedSet:
    """One dataset after the scan; `items` are in order of their keys."""

    index: int
    name: str
    config: DatasetConfig
    rule: BucketRule
    found: int
    items: tuple[Item, ...]
    findings: tuple[Finding, ...]


def scan(
    configs: Sequence[DatasetConfig], *, index: PictureIndex | None = None, verify: bool = False, progress: Progress | None = None
) -> list[ScannedSet]:
    """Look at every picture and caption of all datasets.

    Args:
        configs: one `Config` of a source each.
        index: what earlier starts know; the findings of this one are noted in it.
        verify: read every picture even when it looks unchanged.
        progress: called with (done, total) over all datasets.

    Raises DataError with the problems of all datasets that could not be listed; ConfigError for buckets that cannot exist.
    """
    rules = [rule_for(config) for config in configs]
    index = index or PictureIndex(None)
    sources: list[tuple[Source, Listing]] = []
    problems: list[Problem] = []
    for config in configs:
        try:
            source: Source = realise(config).build()
            sources.append((source, source.listing()))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(str(problems[0]), problems=tuple(problems))
    total = sum(len(listing.records) for _, listing in sources)
    sets: list[ScannedSet] = []
    done = 0
    for position, ((source, listing), rule) in enumerate(zip(sources, rules, strict=True)):
        start = done

        def advance(count: int, start: int = start) -> None:
            if progress:
                progress(start + count, total)

        looked = _look_at_all(listing.records, configs[position], index, verify=verify, advance=advance)
        done += len(listing.records)
        sets.append(_assemble(position, source.name, configs[position], rule, looked, listing))
    return sets


class _Looked(NamedTuple):
    """One picture: known facts, or the problem that keeps it out."""

    record: Record
    known: Known | None
    before: Known | None
    problem: Problem | None
    remarks: tuple[str, ...]


def caption_digest(record: Record) -> str:
    """A short digest of the text of the caption file, to notice edits."""
    return hashlib.sha256((record.caption or "").encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _look_at_all(
    records: Sequence[Record], config: DatasetConfig, index: PictureIndex, *, verify: bool, advance: Callable[[int], None]
) -> list[_Looked]:
    """Pictures are decoded by a few threads (Pillow works outside the interpreter lock); the order of the answer is the records'."""
    looked = []
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        for answer in pool.map(lambda record: _look_at(record, config, index, verify=verify), records):
            if answer.known is not None:
                index.note(answer.record.path, answer.known)
            looked.append(answer)
            advance(len(looked))
    return looked


def _look_at(record: Record, config: DatasetConfig, index: PictureIndex, *, verify: bool) -> _Looked:
    before = index.before(record.path)
    try:
        known = None if verify else index.unchanged(record.path)
        remarks: tuple[str, ...] = ()
        if known is None or known.size.width * known.size.height > config.max_pixels:
            known, remarks = _read(record.path, config)
    except DataError as error:
        return _Looked(record, None, before, replace(error.problems[0], where=shown(record.path)), ())
    except MemoryError:
        return _Looked(record, None, before, Problem("not enough memory to decode it", shown(record.path), fix="lower max_pixels"), ())
    except OSError as error:
        why = error.strerror or str(error)
        return _Looked(record, None, before, Problem("picture cannot be read", shown(record.path), why, "check the file"), ())
    return _Looked(record, known._replace(caption=caption_digest(record)), before, None, remarks)


def _read(path: Path, config: DatasetConfig) -> tuple[Known, tuple[str, ...]]:
    """Decode and hash the whole file. Raises DataError."""
    stamp = stamp_of(path)
    picture = read_image(path, max_pixels=config.max_pixels, background=config.background)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Known(stamp, digest, Size(*picture.image.size)), picture.warnings


def _assemble(position: int, name: str, config: DatasetConfig, rule: BucketRule, looked: Sequence[_Looked], listing: Listing) -> ScannedSet:
    findings = [Finding("skipped", key, problem) for key, problem in listing.problems]
    findings += [Finding("warning", "", Problem(text)) for text in listing.warnings]
    items: list[Item] = []
    for one in looked:
        key = one.record.key
        findings += [Finding("warning", key, Problem(remark, shown(one.record.path))) for remark in one.remarks]
        if one.problem or one.known is None:
            findings.append(Finding("skipped", key, one.problem or Problem("unreadable")))
            continue
        placement = rule.place(one.known.size)
        if placement is None:
            findings.append(Finding("skipped", key, _too_small(one.record, one.known.size, rule)))
            continue
        caption = _caption(one.record, config, findings)
        if caption is not None:
            items.append(Item(one.record, one.known.digest, one.known.size, placement, caption, one.before))
    found = len(looked) + len(listing.problems)
    return ScannedSet(position, name, config, rule, found, tuple(items), tuple(findings))


def _too_small(record: Record, size: Size, rule: BucketRule) -> Problem:
    why = f"{size.width} x {size.height} has a side below buckets.step = {rule.step}, and buckets.upscale is off"
    return Problem("picture is too small", shown(record.path), why, "set buckets.upscale = true, or use a larger picture")


def _caption(record: Record, config: DatasetConfig, findings: list[Finding]) -> str | None:
    """The text that stands for the record's caption; None when the picture is not to be used. Adds what there is to say."""
    captions = config.captions
    if record.caption is None:
        what, rule = "no caption", captions.missing
        why = "looked for " + " ".join(captions.extensions)
        fix = 'write one, set captions.extensions, or set captions.missing = "allow" (with captions.trigger as the caption) or "skip"'
        where, stand_in = shown(record.path), captions.trigger
    elif not record.caption.strip():
        what, rule = "caption is empty", captions.empty
        why, fix = "", 'write one, or set captions.empty = "skip"'
        where, stand_in = shown(record.caption_path or record.path), ""
    else:
        return record.caption
    if rule == "allow":
        findings.append(Finding("warning", record.key, Problem(what, where, why)))
        return stand_in
    findings.append(Finding("error" if rule == "error" else "left out", record.key, Problem(what, where, why, fix)))
    return None
