"""The scan as one HTML file that needs nothing else: every picture with what its bucket keeps of it, its caption, and its problems.

`disk.write_text(path, sheet(sets, report))`
"""

import base64
import html
import io
from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw

from fluxsmith.data.checks import DatasetReport, ScanReport
from fluxsmith.data.companions import mask_picture
from fluxsmith.data.scan import Finding, Item, ScannedSet
from fluxsmith.data.sources.base import shown
from fluxsmith.errors import DataError
from fluxsmith.io.images import read_image

THUMBNAIL = 220  # longest side, pixels
MASKED = (200, 0, 0)
MAX_THUMBNAILS = 400  # of each dataset: about 10 MB
STYLE = """
:root { color-scheme: light dark; --edge: #8884; --bad: #c0392b; --warn: #b7791f }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 1.5rem }
th, td { border-bottom: 1px solid var(--edge); padding: .2rem .9rem .2rem 0; text-align: left }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
ul.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 1rem; list-style: none; padding: 0 }
ul.pictures li { border: 1px solid var(--edge); border-radius: 6px; padding: .6rem; overflow-wrap: anywhere }
ul.pictures img { display: block; margin: 0 auto .5rem; max-width: 100% }
small { opacity: .75; display: block } .bad { color: var(--bad) } .warn { color: var(--warn) } .verdict { font-size: 1.1rem }
"""


def sheet(sets: Sequence[ScannedSet], report: ScanReport) -> str:
    """The whole page."""
    parts = ["<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>"]
    parts.append("<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">")
    parts.append(f"<title>Data scan</title><style>{STYLE}</style></head><body><h1>Data scan</h1>")
    parts += [f"<p>{_text(note)}</p>" for note in report.notes]
    parts += _overview(report.datasets)
    for one, dataset in zip(sets, report.datasets, strict=True):
        parts += _dataset(one, dataset)
    parts.append("</body></html>\n")
    return "".join(parts)


def _overview(datasets: Sequence[DatasetReport]) -> Iterator[str]:
    """One line a data set, with a column for whatever one of them uses; nothing when all are plain."""
    columns: dict[str, list[str]] = {
        "group": [dataset.group for dataset in datasets],
        "regularisation": ["yes" if dataset.is_regularisation else "" for dataset in datasets],
        "masks": ["" if dataset.masks is None else str(dataset.masks) for dataset in datasets],
        "condition pictures": ["" if dataset.conditions is None else str(dataset.conditions) for dataset in datasets],
        "held out": [str(dataset.held_out or "") for dataset in datasets],
    }
    used = {name: values for name, values in columns.items() if any(values)}
    if not used:
        return
    yield "<table><tr><th>data set<th class=n>usable" + "".join(f"<th>{name}" for name in used) + "</tr>"
    for place, dataset in enumerate(datasets):
        cells = "".join(f"<td>{_text(values[place])}" for values in used.values())
        yield f"<tr><td>{_text(dataset.name)}<td class=n>{dataset.usable}{cells}</tr>"
    yield "</table>"
    if columns["group"] != [""] * len(datasets):
        yield "<p><small>Data sets of one group share their batches; the tables of buckets count those of the group.</small></p>"


def _dataset(one: ScannedSet, report: DatasetReport) -> Iterator[str]:
    resolution = one.rule.resolution
    yield f"<h2>{_text(report.name)}</h2><p><small>{_text(report.path)}, resolution {resolution.width} x {resolution.height}</small></p>"
    start = "A run can start with it." if report.is_startable else "A run will not start with it."
    yield f"<p class='verdict{'' if report.is_startable else ' bad'}'>{_text(report.verdict())}. {start}</p>"
    yield from _problems(report)
    yield "<h3>Buckets</h3><table><tr><th>size<th class=n>pictures<th class=n>batches in an epoch</tr>"
    for row in report.buckets:
        yield f"<tr><td>{row.bucket.width} x {row.bucket.height}<td class=n>{row.pictures}<td class=n>{row.batches}</tr>"
    yield "</table>"
    if report.tokens:
        yield "<h3>Caption lengths</h3><table><tr><th>encoder<th class=n>limit<th class=n>mean<th class=n>longest<th class=n>cut</tr>"
        for row in report.tokens:
            cells = (row.encoder, row.limit, f"{row.mean:.0f}", row.longest, len(row.over))
            yield f"<tr><td>{_text(str(cells[0]))}" + "".join(f"<td class=n>{cell}" for cell in cells[1:]) + "</tr>"
        yield "</table>"
    masked = " What is red is masked: not learned." if report.masks else ""
    yield f"<h3>Pictures</h3><p><small>Dark margins are cut off.{masked}</small></p><ul class=pictures>"
    remarks: dict[str, list[Finding]] = {}
    for finding in report.findings:
        remarks.setdefault(finding.key, []).append(finding)
    for item in one.items[:MAX_THUMBNAILS]:
        yield _picture(one, item, remarks.get(item.record.key, []))
    yield "</ul>"
    if len(one.items) > MAX_THUMBNAILS:
        yield f"<p>{len(one.items) - MAX_THUMBNAILS} more pictures are not shown.</p>"


def _problems(report: DatasetReport) -> Iterator[str]:
    shown_kinds = {"error": "bad", "skipped": "bad", "left out": "warn", "warning": "warn"}
    findings = [finding for kind in shown_kinds for finding in report.of(kind)]
    if not findings:
        yield "<p>No problems found.</p>"
        return
    yield "<h3>Problems</h3><table><tr><th>kind<th>what<th>where<th>why<th>cure</tr>"
    for finding in findings:
        problem = finding.problem
        cells = "".join(f"<td>{_text(text)}" for text in (problem.what, problem.where, problem.why, problem.fix))
        yield f"<tr><td class={shown_kinds[finding.kind]}>{finding.kind}{cells}</tr>"
    yield "</table>"


def _picture(one: ScannedSet, item: Item, remarks: Sequence[Finding]) -> str:
    bucket = item.placement.bucket
    lines = [
        f"<b>{_text(shown(item.record.key))}</b>",
        f"<small>{item.size.width} x {item.size.height} to {bucket.width} x {bucket.height}</small>",
    ]
    lines.append(f"<p>{_text(item.caption) or '<i>no caption</i>'}</p>")
    lines += [f"<small class=warn>{_text(finding.problem.what)}</small>" for finding in remarks]
    try:
        picture = read_image(item.record.path, max_pixels=one.config.max_pixels, background=one.config.background).image
        if item.mask is not None:
            grey = mask_picture(item.mask, one.config).resize(picture.size)
            picture = Image.composite(picture, Image.blend(picture, Image.new("RGB", picture.size, MASKED), 0.7), grey)
    except DataError:
        return f"<li>{''.join(lines)}<small class=bad>cannot be read any more</small></li>"
    return f"<li><img alt='' src='data:image/jpeg;base64,{_thumbnail(picture, item)}'>{''.join(lines)}</li>"


def _thumbnail(picture: Image.Image, item: Item) -> str:
    """The whole picture, darkened where the crop cuts it off, as base64 JPEG."""
    placement = item.placement
    scale = THUMBNAIL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    small = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    across, down = size[0] / placement.resized.width, size[1] / placement.resized.height
    kept = (placement.x * across, placement.y * down)
    window = (*kept, kept[0] + placement.bucket.width * across - 1, kept[1] + placement.bucket.height * down - 1)
    mask = Image.new("L", size, 190)
    ImageDraw.Draw(mask).rectangle([max(0.0, window[0]), max(0.0, window[1]), max(window[0], window[2]), max(window[1], window[3])], fill=0)
    small.paste((20, 20, 20), (0, 0), mask)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _text(text: str) -> str:
    return html.escape(shown(text))
