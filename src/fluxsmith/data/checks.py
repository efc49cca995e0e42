"""Everything about the data that is worth saying before the first step, in one report.

Rule: a run starts when at least one usable picture remains in every dataset, nothing was found that the options call an error,
and the share of pictures skipped for problems is at most `max_skipped`; else one DataError (exit 3) lists all problems.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from fluxsmith.config.schema import ValidationConfig
from fluxsmith.data.captions import TRIGGER, steady
from fluxsmith.data.scan import EMPTY_CAPTION, NO_CAPTION, Finding, Item, ScannedSet
from fluxsmith.data.sources.base import shown
from fluxsmith.data.split import held_out_of, share_of
from fluxsmith.data.types import BatchSpec, Size
from fluxsmith.errors import DataError, Problem

TokenCounts = Callable[[str], dict[str, tuple[int, int]]]
LISTED = 5


class BucketRow(NamedTuple):
    """One bucket of one dataset; `batches` are those of one epoch."""

    bucket: Size
    pictures: int
    batches: int


class TokenRow(NamedTuple):
    """Lengths of a dataset's captions for one text encoder; `over` are keys of captions that are cut."""

    encoder: str
    limit: int
    longest: int
    mean: float
    over: tuple[str, ...]


@dataclass(frozen=True)
class DatasetReport:
    """What the scan found in one dataset."""

    name: str
    path: str
    found: int
    usable: int
    with_caption: int
    findings: tuple[Finding, ...]
    buckets: tuple[BucketRow, ...]
    tokens: tuple[TokenRow, ...]
    max_skipped: float
    group: str = ""
    is_regularisation: bool = False
    masks: int | None = None  # pictures that have one; None where none are wanted
    conditions: int | None = None
    held_out: int = 0  # pictures kept for validation

    def of(self, *kinds: str) -> list[Finding]:
        """The findings of some kinds."""
        return [finding for finding in self.findings if finding.kind in kinds]

    @property
    def is_startable(self) -> bool:
        """Whether the rule of this module lets a run start with this dataset."""
        return self.usable > 0 and not self.of("error") and len(self.of("skipped")) <= self.max_skipped * self.found

    def verdict(self) -> str:
        """One line: `cats: 24 found, 22 usable, 2 skipped`."""
        counts = Counter(finding.kind for finding in self.findings)
        parts = [f"{self.found} found", f"{self.usable} usable"]
        names = {"error": "with errors", "skipped": "skipped", "left out": "left out as asked"}
        parts += [f"{counts[kind]} {text}" for kind, text in names.items() if counts[kind]]
        return f"{self.name}: {', '.join(parts + self.traits())}"

    def traits(self) -> list[str]:
        """What is special about these pictures, in words; empty for a plain dataset."""
        traits = [f'group "{self.group}"'] if self.group else []
        traits += ["regularisation"] if self.is_regularisation else []
        traits += [f"{self.masks} with a mask"] if self.masks is not None else []
        traits += [f"{self.conditions} with a condition picture"] if self.conditions is not None else []
        return traits + ([f"{self.held_out} held out"] if self.held_out else [])


@dataclass(frozen=True)
class ScanReport:
    """The report of all datasets."""

    datasets: tuple[DatasetReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def is_startable(self) -> bool:
        """Whether a run may start."""
        return all(dataset.is_startable for dataset in self.datasets)

    def raise_if_unusable(self) -> None:
        """Raises DataError with every problem when a run must not start."""
        if self.is_startable:
            return
        problems: list[Problem] = []
        for dataset in self.datasets:
            blocking = dataset.of("error", "skipped")
            if not dataset.is_startable:
                problems.append(_why_not(dataset))
                problems += [finding.problem for finding in blocking]
        raise DataError(str(problems[0]), problems=tuple(problems))

    def warnings(self) -> list[str]:
        """What the user should read although the run starts: skipped pictures one by one, warnings gathered by kind."""
        lines: list[str] = []
        for dataset in self.datasets:
            lines += [f"skipped: {finding.problem}" for finding in dataset.of("skipped")]
            gathered: dict[str, list[Finding]] = {}
            for finding in dataset.of("warning", "left out"):
                gathered.setdefault(finding.problem.what, []).append(finding)
            for findings in gathered.values():
                lines.append(str(findings[0].problem) if len(findings) == 1 else _gathered(dataset.name, findings))
        return lines

    def as_record(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "is_startable": self.is_startable,
            "datasets": [
                _plain(dataset) | {"is_startable": dataset.is_startable, "verdict": dataset.verdict()} for dataset in self.datasets
            ],
            "notes": list(self.notes),
        }


def _plain(value: Any) -> Any:
    """Dataclasses and named tuples as dicts, all the way down; undecodable bytes of file names escaped."""
    if isinstance(value, str):
        return shown(value) if any("\ud800" <= char <= "\udfff" for char in value) else value
    if isinstance(value, tuple):
        return _plain(value._asdict()) if hasattr(value, "_asdict") else [_plain(one) for one in value]  # type: ignore[attr-defined]  # named
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, DatasetReport | Problem):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value


def _gathered(name: str, findings: Sequence[Finding]) -> str:
    keys = ", ".join(shown(finding.key) for finding in findings[:LISTED])
    more = f" and {len(findings) - LISTED} more" if len(findings) > LISTED else ""
    fix = f". Fix: {findings[0].problem.fix}" if findings[0].problem.fix else ""
    return f"{name}: {findings[0].problem.what}: {len(findings)} pictures ({keys}{more}){fix}"


def _why_not(dataset: DatasetReport) -> Problem:
    skipped, errors = len(dataset.of("skipped")), len(dataset.of("error"))
    below = "see below; each line names its cure"
    if errors:
        whole = [finding for finding in dataset.of("error") if not finding.key]
        is_caption = {finding.problem.what for finding in dataset.of("error")} <= {NO_CAPTION, EMPTY_CAPTION}
        what = "have no usable caption" if is_caption else "have problems that stop the run"
        text = f"{errors} of {dataset.found} pictures {what}" if not whole else "masks or condition pictures do not match the pictures"
        return Problem(text, dataset.path, "", below)
    if not dataset.usable:
        return Problem(f"none of {dataset.found} pictures can be used", dataset.path, "", below)
    share = skipped / dataset.found
    why = f"{share:.0%} skipped, max_skipped = {dataset.max_skipped:.0%}"
    fix = f"mend the pictures below, or set max_skipped = {min(1.0, share + 0.005):.2f}"
    return Problem(f"{skipped} of {dataset.found} pictures cannot be used", dataset.path, why, fix)


def report_on(
    sets: Sequence[ScannedSet], *, token_counts: TokenCounts | None = None, validation: ValidationConfig | None = None
) -> ScanReport:
    """Gather the findings of a scan, and add what shows only over all pictures (copies, enlarged ones, long captions)."""
    notes = () if token_counts else ("captions were not measured in tokens: no tokenizer",)
    validation = validation or ValidationConfig()
    held = held_out_of(sets, validation)
    reports = []
    for one in sets:
        mates = [other for other in sets if other is one or (one.config.group and other.config.group == one.config.group)]
        measured = [item for item in one.items if item.digest in held] if share_of(one, validation) else []
        reports.append(replace(_report(one, mates, token_counts), held_out=len(measured)))
    return ScanReport(tuple(reports), notes)


def _bucket_rows(one: ScannedSet, mates: Sequence[ScannedSet]) -> Iterator[BucketRow]:
    """Pictures of the set; batches of all sets that it shares them with."""
    counts = Counter(item.placement.bucket for item in one.items)
    uses: Counter[Size] = Counter()
    for mate in mates:
        for item in mate.items:
            uses[item.placement.bucket] += mate.config.repeats
    for bucket, count in sorted(counts.items()):
        yield BucketRow(bucket, count, -(-uses[bucket] // one.config.batch_size))


def _report(one: ScannedSet, mates: Sequence[ScannedSet], token_counts: TokenCounts | None) -> DatasetReport:
    config = one.config
    rows = tuple(_bucket_rows(one, mates))
    tokens = tuple(_token_rows(one, token_counts)) if token_counts else ()
    extra = [*_copies(one.items), *_enlarged(one), *_text_remarks(one), *_too_long(one, tokens)]
    return DatasetReport(
        name=one.name,
        path=shown(config.model_dump(mode="json").get("path", one.name)),
        found=one.found,
        usable=len(one.items),
        with_caption=sum(bool(item.record.caption) for item in one.items),
        findings=one.findings + tuple(extra),
        buckets=rows,
        tokens=tokens,
        max_skipped=config.max_skipped,
        group=config.group,
        is_regularisation=config.regularisation,
        masks=sum(item.mask is not None for item in one.items) if config.alpha_mask or config.mask_dir else None,
        conditions=sum(item.condition is not None for item in one.items) if config.condition_dir else None,
    )


def _copies(items: Sequence[Item]) -> list[Finding]:
    by_digest: dict[str, list[Item]] = {}
    for item in items:
        by_digest.setdefault(item.digest, []).append(item)
    findings = []
    for same in by_digest.values():
        if len(same) > 1:
            names = " = ".join(shown(item.record.key) for item in same[:LISTED])
            problem = Problem(
                "the same picture is there several times", shown(same[0].record.path), names, "delete the copies, or use repeats"
            )
            findings.append(Finding("warning", same[0].record.key, problem))
    return findings


def _enlarged(one: ScannedSet) -> list[Finding]:
    findings = []
    for item in one.items:
        resized = item.placement.resized
        if resized.width > item.size.width or resized.height > item.size.height:
            why = f"{item.size.width} x {item.size.height} to {resized.width} x {resized.height}"
            fix = "use larger pictures, lower resolution, or set buckets.upscale = false"
            findings.append(Finding("warning", item.record.key, Problem("picture is enlarged", shown(item.record.path), why, fix)))
    return findings


def _text_remarks(one: ScannedSet) -> list[Finding]:
    captions = one.config.captions
    findings = []
    for item in one.items:
        where = shown(item.record.caption_path or item.record.path)
        lines = [line for line in item.caption.splitlines() if line.strip()]
        if len(lines) > 1 and not captions.wildcards and not captions.first_line:
            fix = "put the caption on one line, set captions.wildcards = true to draw one of them, or captions.first_line = true"
            problem = Problem("only the first line of the caption is used", where, f"{len(lines)} lines", fix)
            findings.append(Finding("warning", item.record.key, problem))
        if TRIGGER in item.caption and not captions.trigger:
            problem = Problem(f"{TRIGGER} is in the caption and is not replaced", where, "", "set captions.trigger")
            findings.append(Finding("warning", item.record.key, problem))
    return findings


def _token_rows(one: ScannedSet, token_counts: TokenCounts) -> list[TokenRow]:
    counts = [(item.record.key, token_counts(steady(item.caption, one.config.captions))) for item in one.items]
    encoders = list(counts[0][1]) if counts else []
    rows = []
    for encoder in encoders:
        used = [(key, *count[encoder]) for key, count in counts]
        over = tuple(key for key, number, limit in used if number > limit)
        rows.append(TokenRow(encoder, used[0][2], max(row[1] for row in used), sum(row[1] for row in used) / len(used), over))
    return rows


def _too_long(one: ScannedSet, tokens: Sequence[TokenRow]) -> list[Finding]:
    """T5's cut loses words; CLIP feeds only the pooled vector, so its cut is no reason to shorten a caption."""
    t5 = next((row for row in tokens if row.encoder == "t5xxl"), None)
    if t5 is None:
        return []
    paths = {item.record.key: shown(item.record.caption_path or item.record.path) for item in one.items}
    why = f"more than {t5.limit} T5 tokens"
    return [Finding("warning", key, Problem("caption is cut", paths[key], why, "shorten the caption")) for key in t5.over]


def check_fits(batches: Sequence[BatchSpec], batch_sizes: Sequence[int], *, accumulation: int, world: int = 1) -> list[str]:
    """Compare one epoch with what one optimizer step takes.

    Args:
        batches: the micro-batches of an epoch.
        batch_sizes: of each dataset.
        accumulation, world: micro-batches in a step, and processes.

    Returns warnings; raises DataError when the epoch has no batch at all.
    """
    if not batches:
        raise DataError(
            "an epoch has no batch",
            why="no picture is left to train",
            fix="add pictures, or lower validation.share so that some are trained",
        )
    warnings = []
    wanted = accumulation * world
    if len(batches) < wanted:
        repeats = -(-wanted // len(batches))
        processes = f" x {world} processes" if world > 1 else ""
        warnings.append(
            f"an epoch has {len(batches)} micro-batches, one step takes {wanted} (accumulation {accumulation}{processes}): "
            f"steps span epochs. Fix: add pictures, set repeats = {repeats}, or accumulation = {max(1, len(batches) // world)}"
        )
    for dataset, size in enumerate(batch_sizes):
        fullest = max((len(spec.uses) for spec in batches if spec.dataset == dataset), default=size)
        if fullest < size:
            warnings.append(
                f"dataset {dataset + 1}: no bucket fills a batch of {size}, the fullest has {fullest} uses an epoch: batches are smaller. "
                f"Fix: set batch_size = {fullest}, or repeats = {-(-size // fullest)}"
            )
    return warnings
