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
from fluxsmith.data.augment import Face, face_in_name, face_placement
from fluxsmith.data.buckets import BucketRule, Placement, rule_for
from fluxsmith.data.companions import Companion, mismatch, with_companions
from fluxsmith.data.index import Known, PictureIndex, stamp_of
from fluxsmith.data.sources.base import Listing, Source, shown
from fluxsmith.data.types import Record, Size
from fluxsmith.errors import DataError, Problem
from fluxsmith.io.images import read_image

NO_CAPTION, EMPTY_CAPTION = "no caption", "caption is empty"
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
    placement: Placement  # with the centre crop, or the one around the face
    caption: str  # the file's text, or what stands for it
    before: Known | None = None  # what was known of this file at the last start
    mask: Companion | None = None
    condition: Companion | None = None
    face: Face | None = None  # where the file name says it is, with `face_crop`


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
    listings = _listings(configs)
    total = sum(len(listing.records) for _, listing, _ in listings)
    sets: list[ScannedSet] = []
    done = 0
    for position, ((name, listing, unmatched), rule) in enumerate(zip(listings, rules, strict=True)):
        start = done

        def advance(count: int, start: int = start) -> None:
            if progress:
                progress(start + count, total)

        looked = _look_at_all(listing.records, configs[position], index, verify=verify, advance=advance)
        done += len(listing.records)
        found = [Finding("error", "", problem) for problem in unmatched]
        found += [Finding("skipped", key, problem) for key, problem in listing.problems]
        found += [Finding("warning", "", Problem(text)) for text in listing.warnings]
        sets.append(
            _assemble(ScannedSet(position, name, configs[position], rule, len(looked) + len(listing.problems), (), ()), looked, found)
        )
    return sets


def _listings(configs: Sequence[DatasetConfig]) -> list[tuple[str, Listing, list[Problem]]]:
    """Name, records and problems with masks and condition pictures of every dataset. Raises DataError."""
    listings: list[tuple[str, Listing, list[Problem]]] = []
    problems: list[Problem] = []
    for config in configs:
        try:
            source: Source = realise(config).build()
            listing = source.listing()
        except DataError as error:
            problems += error.problems
            continue
        records, unmatched = with_companions(listing, config)
        listings.append((source.name, listing._replace(records=records), unmatched))
    if problems:
        raise DataError(str(problems[0]), problems=tuple(problems))
    return listings


class _Facts(NamedTuple):
    """One file: known facts, or the problem that keeps it out."""

    known: Known | None
    before: Known | None = None
    problem: Problem | None = None
    remarks: tuple[str, ...] = ()


class _Looked(NamedTuple):
    """A record and what its files are."""

    record: Record
    picture: _Facts
    mask: _Facts | None
    condition: _Facts | None


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
            record = answer.record
            for path, facts in (
                (record.path, answer.picture),
                (record.mask_path, answer.mask),
                (record.condition_path, answer.condition),
            ):
                if path is not None and facts is not None and facts.known is not None:
                    index.note(path, facts.known)
            looked.append(answer)
            advance(len(looked))
    return looked


def _look_at(record: Record, config: DatasetConfig, index: PictureIndex, *, verify: bool) -> _Looked:
    picture = _facts(record.path, config, index, verify=verify, wants_alpha=config.alpha_mask)
    if picture.known is not None:
        picture = picture._replace(known=picture.known._replace(caption=caption_digest(record)))
    mask = _facts(record.mask_path, config, index, verify=verify) if record.mask_path else None
    condition = _facts(record.condition_path, config, index, verify=verify) if record.condition_path else None
    return _Looked(record, picture, mask, condition)


def _facts(path: Path, config: DatasetConfig, index: PictureIndex, *, verify: bool, wants_alpha: bool = False) -> _Facts:
    before = index.before(path)
    try:
        known = None if verify else index.unchanged(path)
        remarks: tuple[str, ...] = ()
        if known is None or known.size.width * known.size.height > config.max_pixels or (wants_alpha and known.has_alpha is None):
            known, remarks = _read(path, config)
    except DataError as error:
        return _Facts(None, before, replace(error.problems[0], where=shown(path)))
    except MemoryError:
        return _Facts(None, before, Problem("not enough memory to decode it", shown(path), fix="lower max_pixels"))
    except OSError as error:
        why = error.strerror or str(error)
        return _Facts(None, before, Problem("picture cannot be read", shown(path), why, "check the file"))
    return _Facts(known, before, None, remarks)


def _read(path: Path, config: DatasetConfig) -> tuple[Known, tuple[str, ...]]:
    """Decode and hash the whole file. Raises DataError."""
    stamp = stamp_of(path)
    picture = read_image(path, max_pixels=config.max_pixels, background=config.background)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Known(stamp, digest, Size(*picture.image.size), has_alpha=picture.alpha is not None), picture.warnings


def _assemble(empty: ScannedSet, looked: Sequence[_Looked], findings: list[Finding]) -> ScannedSet:
    """The set with its items, and the findings about them after those about the whole."""
    items = []
    for one in looked:
        findings += [Finding("warning", one.record.key, Problem(remark, shown(one.record.path))) for remark in one.picture.remarks]
        item = _item(one, empty, findings)
        if item is not None:
            items.append(item)
    if empty.config.alpha_mask and empty.config.mask_dir is None and items and not any(item.mask for item in items):
        problem = Problem(
            "alpha_mask changes nothing: no picture has transparency", empty.name, "", "remove alpha_mask, or save PNGs with it"
        )
        findings.append(Finding("warning", "", problem))
    return replace(empty, items=tuple(items), findings=tuple(findings))


def _item(one: _Looked, scanned: ScannedSet, findings: list[Finding]) -> Item | None:
    """The usable picture; else None, and a finding that says why."""
    record, key, config = one.record, one.record.key, scanned.config
    known = one.picture.known
    problems = [facts.problem for facts in (one.picture, one.mask, one.condition) if facts is not None and facts.problem is not None]
    if problems or known is None:
        findings += [Finding("skipped", key, problem) for problem in problems or [Problem("unreadable")]]
        return None
    placement = scanned.rule.place(known.size)
    if placement is None:
        findings.append(Finding("skipped", key, _too_small(record, known.size, scanned.rule)))
        return None
    face = face_in_name(record.path.stem) if config.face_crop else None
    if config.face_crop and face is None:
        problem = Problem("face_crop: the file name locates no face", shown(record.path), "", "name it NAME_cx_cy_w_h, or remove face_crop")
        findings.append(Finding("error", key, problem))
    if config.face_crop and face:
        placement = face_placement(known.size, face, placement.bucket, factors=config.face_crop, rng=None)
    mask = _companion("mask", record.mask_path, one.mask, known, (key, findings))
    if mask is None and config.alpha_mask and config.mask_dir is None and known.has_alpha:
        mask = Companion(record.path, known.digest, known.size, is_alpha=True)
    condition = _companion("condition picture", record.condition_path, one.condition, known, (key, findings))
    caption = _caption(record, config, findings)
    if caption is None:
        return None
    return Item(record, known.digest, known.size, placement, caption, one.picture.before, mask, condition, face)


def _companion(what: str, path: Path | None, facts: _Facts | None, picture: Known, notes: tuple[str, list[Finding]]) -> Companion | None:
    """A mask or condition picture that fits; adds a finding (for the key in `notes`) about one that does not."""
    if path is None or facts is None or facts.known is None:
        return None
    problem = mismatch(what, path, facts.known.size, picture.size)
    if problem is not None:
        key, findings = notes
        findings.append(Finding("error", key, problem))
    return Companion(path, facts.known.digest, facts.known.size)


def _too_small(record: Record, size: Size, rule: BucketRule) -> Problem:
    why = f"{size.width} x {size.height} has a side below buckets.step = {rule.step}, and buckets.upscale is off"
    return Problem("picture is too small", shown(record.path), why, "set buckets.upscale = true, or use a larger picture")


def _caption(record: Record, config: DatasetConfig, findings: list[Finding]) -> str | None:
    """The text that stands for the record's caption; None when the picture is not to be used. Adds what there is to say."""
    captions = config.captions
    if record.caption is None:
        what, rule = NO_CAPTION, captions.missing
        why = "looked for " + " ".join(captions.extensions)
        fix = 'write one, set captions.extensions, or set captions.missing = "allow" (with captions.trigger as the caption) or "skip"'
        where, stand_in = shown(record.path), captions.trigger
    elif not record.caption.strip():
        what, rule = EMPTY_CAPTION, captions.empty
        why, fix = "", 'write one, or set captions.empty = "skip"'
        where, stand_in = shown(record.caption_path or record.path), ""
    else:
        return record.caption
    if rule == "allow":
        findings.append(Finding("warning", record.key, Problem(what, where, why)))
        return stand_in
    findings.append(Finding("error" if rule == "error" else "left out", record.key, Problem(what, where, why, fix)))
    return None
