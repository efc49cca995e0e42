"""The adapter tools of sd-scripts, done by our own: each ratio counts once, encoders are kept, metadata is true.

`run_tool(tool_request(draft))` writes the files (over what is there, as sd-scripts does) and gives lines to print.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from fluxsmith.dialects.sd_scripts.tool_requests import CheckRequest, ConvertRequest, ExtractRequest, MergeRequest, Request, ResizeRequest
from fluxsmith.tools import convert, extract, merge, merge_adapters, resize
from fluxsmith.tools.low_rank import Ranks
from fluxsmith.tools.resize import Method
from fluxsmith.tools.weights import weight_report

Progress = Callable[[int, int, str], None]
METHODS: dict[str, Method] = {"ratio": "ratio", "energy": "energy", "sum": "sum"}


def run_tool(request: Request, progress: Progress = lambda *_: None) -> Iterator[str]:
    """Do it. Raises as the tools do."""
    if isinstance(request, ExtractRequest):
        yield from _extract(request, progress)
    elif isinstance(request, MergeRequest):
        yield from _merge(request, progress) if request.models else _merge_together(request, progress)
    elif isinstance(request, ConvertRequest):
        yield from _convert(request)
    elif isinstance(request, ResizeRequest):
        yield from _resize(request)
    else:
        yield from _check(request)


def _extract(request: ExtractRequest, progress: Progress) -> Iterator[str]:
    """The 304 block layers of FLUX (228 of Chroma), as sd-scripts takes them."""
    asked = extract.ExtractRequest(
        {"dit": (request.original, request.tuned)},
        Path(request.save_to),
        Ranks(number=request.rank),
        clamp_quantile=request.clamp_quantile,
        dtype=request.dtype,
        device=request.device,
        has_metadata=request.has_metadata,
        overwrite=True,
    )
    report = extract.extract(asked, progress)
    yield f"{report.target}: {len(report.layers)} layers of rank {request.rank}, {1 - report.residual:.4%} of the squared difference"
    if report.left_out:
        yield f"{len(report.left_out)} other tensors differ and are not in the file, e.g. {report.left_out[0][0]}"
    yield from report.notes


def _merge(request: MergeRequest, progress: Progress) -> Iterator[str]:
    """Layers without a place are skipped, with a line that says so."""
    asked = merge.MergeRequest(
        request.models, {role: Path(path) for role, path in request.save_to.items()}, _files(request), dtype=request.dtype,
        device=request.device, skips_unmatched=True, has_metadata=request.has_metadata, overwrite=True,
    )  # fmt: skip
    report = merge.merge_into_model(asked, progress)
    yield from (f"{role}: {path}" for role, path in report.targets.items())
    yield from (f"{count} layers of {name}" for name, count in report.layers.items())
    if report.skipped:
        yield f"{len(report.skipped)} layers have no place in these models, e.g. {report.skipped[0]}"
    yield from report.notes


def _merge_together(request: MergeRequest, progress: Progress) -> Iterator[str]:
    """With --concat the exact sum; without, the nearest LoRA of the largest rank among the files."""
    asked = merge_adapters.AdapterMergeRequest(
        _files(request), Path(request.save_to["dit"]), "exact" if request.keeps_ranks else "svd", dtype=request.dtype,
        has_metadata=request.has_metadata, device=request.device, overwrite=True,
    )  # fmt: skip
    report = merge_adapters.merge_adapters(asked, progress)
    ranks = ", ".join(f"{count} of rank {rank}" for rank, count in report.ranks.items())
    yield f"{report.target}: {report.layers} layers ({ranks})"
    if report.residual > 1e-6:
        yield f"up to {report.residual:.4%} of a layer's squares is lost; --concat keeps all"


def _files(request: MergeRequest) -> tuple[tuple[Path, float], ...]:
    return tuple((Path(path), ratio) for path, ratio in request.adapters)


def _convert(request: ConvertRequest) -> Iterator[str]:
    asked = convert.ConvertRequest(request.source, Path(request.target), request.write_as, expects=request.read_as, overwrite=True)
    report = convert.convert(asked)
    yield f"{report.target}: {report.layers} layers, {report.source_format} -> {report.format}"
    if report.rounded:
        yield "strengths were multiplied into 16-bit factors, which rounds them once more"


def _resize(request: ResizeRequest) -> Iterator[str]:
    asked = resize.ResizeRequest(
        request.source, Path(request.target), request.rank, METHODS.get(request.method or ""), request.parameter,
        dtype=request.dtype or "keep", device=request.device, overwrite=True,
    )  # fmt: skip
    report = resize.resize(asked)
    for layer in report.layers if request.is_verbose else ():
        kept = f"sum(S) retained {layer.sum:.1%}, Frobenius norm retained {layer.norm:.1%}"
        yield f"{layer.path}: rank {layer.before} -> {layer.rank}, {kept}"
    mean, least = report.kept
    yield f"{report.target}: {mean:.2%} of the norm is kept on average, {least:.2%} at least"


def _check(request: CheckRequest) -> Iterator[str]:
    for item in weight_report(request.file, shows_all=request.shows_all):
        yield f"{item.name},{list(item.shape)},{item.mean:.6g},{item.least:.6g}"
