"""`fluxsmith lora extract` and `merge`: adapters out of models, into models, and with each other."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fluxsmith.cli.arguments import AdapterFormat, AsJson, Device, DryRun, Overwrite, Target, WrittenDtype, weighted
from fluxsmith.cli.progress import progress_line
from fluxsmith.errors import ConfigError
from fluxsmith.io.durable import readable_size

if TYPE_CHECKING:
    from fluxsmith.tools.extract import ExtractReport
    from fluxsmith.tools.merge import MergeReport, MergeRequest
    from fluxsmith.tools.merge_adapters import AdapterMergeRequest

app = typer.Typer(help="Make adapters and merged models.", no_args_is_help=True)
DEFAULT_RANK = 32
SHOWN = 5  # layers with the largest residual


@app.callback()
def lora() -> None:
    """Make adapters and merged models."""


@app.command("extract")
def extract_lora(  # noqa: PLR0913  a verb has as many arguments as options
    base: Annotated[str, typer.Argument(help="Original transformer: file, folder or hub id.")] = "",
    tuned: Annotated[str, typer.Argument(help="Tuned transformer.")] = "",
    *,
    out: Target,
    clip_l: Annotated[tuple[str, str] | None, typer.Option("--clip-l", metavar="BASE TUNED", help="CLIP-L of both models too.")] = None,
    t5xxl: Annotated[tuple[str, str] | None, typer.Option("--t5xxl", metavar="BASE TUNED", help="T5-XXL of both models too.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help=f"Rank of every layer; {DEFAULT_RANK} unless --energy or --ratio.")] = None,
    energy: Annotated[float | None, typer.Option("--energy", help="Smallest rank that holds this share of the squared difference.")] = None,
    ratio: Annotated[float | None, typer.Option("--ratio", help="Keep singular values above the largest / ratio.")] = None,
    max_rank: Annotated[int | None, typer.Option("--max-rank", help="Limit of --energy and --ratio.")] = None,
    layers: Annotated[list[str] | None, typer.Option("--layers", help="Preset (all, blocks, attention, mlp, ...) or pattern.")] = None,
    min_difference: Annotated[float, typer.Option("--min-difference", help="Leave layers out where no weight differs by more.")] = 0.0,
    clamp_quantile: Annotated[float | None, typer.Option("--clamp-quantile", help="Cut factors off there; sd-scripts: 0.99.")] = None,
    dtype: Annotated[WrittenDtype, typer.Option("--dtype", help="Type of the factors.")] = "bf16",
    form: Annotated[AdapterFormat, typer.Option("--format", help="Names of the layers.")] = "kohya",
    device: Device = "cpu",
    seed: Annotated[int, typer.Option("--seed", help="Of the randomised decomposition.")] = 0,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """A LoRA from the difference of two models. Example:
    fluxsmith lora extract flux1-dev.safetensors tuned.safetensors -o lora.safetensors --rank 64
    """
    if bool(base) != bool(tuned):
        raise ConfigError("one transformer is given", fix="give the original and the tuned one, or none with --clip-l or --t5xxl")
    given = {"dit": (base, tuned) if base else None, "clip_l": clip_l, "t5xxl": t5xxl}
    pairs = {role: pair for role, pair in given.items() if pair}
    if rank is None and energy is None and ratio is None:
        rank = DEFAULT_RANK
    from fluxsmith.tools.extract import ExtractRequest, extract
    from fluxsmith.tools.low_rank import Ranks

    request = ExtractRequest(
        pairs, out, Ranks(rank, energy, ratio, max_rank), tuple(layers or ("all",)), min_difference, clamp_quantile, dtype, form,
        device, seed, overwrite=overwrite, is_dry_run=dry_run,
    )  # fmt: skip
    with progress_line() as progress:
        report = extract(request, progress)
    print(json.dumps(report.as_record(), indent=1) if as_json else "\n".join(_extract_lines(report, dry_run)))


def _extract_lines(report: "ExtractReport", dry_run: bool) -> list[str]:
    notes = [f"  note: {note}" for note in report.notes]
    if dry_run:
        return [f"{report.target} would hold up to {len(report.layers)} layers; nothing was written", *notes]
    ranks = [layer.rank for layer in report.layers]
    spread = f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    lines = [f"{report.target}: {len(report.layers)} layers, {spread}", f"  holds {1 - report.residual:.4%} of the squared difference"]
    worst = sorted(report.layers, key=lambda layer: -layer.residual)[:SHOWN]
    lines += [f"    {layer.path}: rank {layer.rank}, {layer.residual:.4%} lost" for layer in worst if layer.residual >= 1e-6]
    lines += [f"  {len(report.same)} layers are the same in both models"] if report.same else []
    if report.left_out:
        name, norm = max(report.left_out, key=lambda pair: pair[1])
        lines.append(f"  {len(report.left_out)} other tensors differ and are not in the file, most {name} (norm {norm:.4g})")
    return [*lines, f"  {report.verdict}", *notes]


@app.command("merge")
def merge_lora(  # noqa: PLR0913  a verb has as many arguments as options
    adapters: Annotated[list[str], typer.Argument(metavar="FILE[:STRENGTH]...", help="Adapters of any format and kind.")],
    *,
    out: Target = Path(),
    into: Annotated[str, typer.Option("--into", help="Transformer to merge into; without a model, adapters are merged together.")] = "",
    clip_l: Annotated[tuple[str, str] | None, typer.Option("--clip-l", metavar="FILE OUT", help="CLIP-L to merge into.")] = None,
    t5xxl: Annotated[tuple[str, str] | None, typer.Option("--t5xxl", metavar="FILE OUT", help="T5-XXL to merge into.")] = None,
    dtype: Annotated[WrittenDtype, typer.Option("--dtype", help="Type to write; keep is that of the base.")] = "keep",
    layout: Annotated[
        Literal["bfl", "same"], typer.Option("--layout", help="Original names, or every tensor of the base under its own.")
    ] = "bfl",
    skip_unmatched: Annotated[bool, typer.Option("--skip-unmatched", help="Leave out layers that the models do not have.")] = False,
    rank: Annotated[int | None, typer.Option("--rank", help="Adapters together: cut the sum down to this rank by SVD.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Adapters together: the sum itself, as a full difference.")] = False,
    base: Annotated[str, typer.Option("--base", help="Adapters together: their model, for kinds that depend on its weights.")] = "",
    form: Annotated[AdapterFormat | None, typer.Option("--format", help="Adapters together: names; those of the first file.")] = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Merge adapters. Examples: fluxsmith lora merge cats.safetensors:0.8 --into flux1-dev.safetensors -o merged.safetensors;
    fluxsmith lora merge a.safetensors:0.5 b.safetensors:0.5 -o ab.safetensors
    """
    given = tuple(weighted(text, "adapter") for text in adapters)
    pairs = {"dit": (into, str(out)) if into else None, "clip_l": clip_l, "t5xxl": t5xxl}
    models = {role: pair for role, pair in pairs.items() if pair}
    if (into or not models) and not out.name:
        raise ConfigError("no output is given", fix="add -o FILE.safetensors")
    together = {"--rank": rank is not None, "--full": full, "--base": bool(base), "--format": form is not None}
    apart = {"--layout": layout != "bfl", "--skip-unmatched": skip_unmatched, "--dry-run": dry_run}
    odd = [name for name, is_on in (together if models else apart).items() if is_on]
    if odd:
        raise ConfigError(f"{odd[0]} is for merging adapters {'with each other' if models else 'into a model'}", fix=f"drop {odd[0]}")
    if rank is not None and full:
        raise ConfigError("--rank and --full exclude each other", fix="drop one")
    if models:
        from fluxsmith.tools.merge import MergeRequest

        sources = {role: model for role, (model, _) in models.items()}
        targets = {role: Path(target) for role, (_, target) in models.items()}
        files = tuple((Path(path), strength) for path, strength in given)
        _into_models(MergeRequest(sources, targets, files, dtype, layout, device, skip_unmatched, True, overwrite, dry_run), as_json)
        return
    from fluxsmith.tools.merge_adapters import AdapterMergeRequest

    how = "full" if full else "svd" if rank is not None else "exact"
    _together(AdapterMergeRequest(given, out, how, rank, base or None, form, dtype, True, device, overwrite), as_json)


def _into_models(request: "MergeRequest", as_json: bool) -> None:
    from fluxsmith.tools.merge import merge_into_model

    with progress_line() as progress:
        report = merge_into_model(request, progress)
    print(json.dumps(report.as_record(), indent=1) if as_json else "\n".join(_merge_lines(report, request.is_dry_run)))


def _together(request: "AdapterMergeRequest", as_json: bool) -> None:
    from fluxsmith.tools.merge_adapters import merge_adapters

    with progress_line() as progress:
        made = merge_adapters(request, progress)
    if as_json:
        print(json.dumps(made.as_record(), indent=1))
        return
    ranks = ", ".join(f"{count} of rank {rank}" for rank, count in made.ranks.items())
    print(f"{made.target}: {made.layers} layers ({ranks})")
    if made.residual:
        print(f"  up to {made.residual:.4%} of a layer's squares is lost")
    print(f"  {made.verdict}")


def _merge_lines(report: "MergeReport", dry_run: bool) -> list[str]:
    lines = [
        f"{path}: {'would be written' if dry_run else readable_size(report.bytes[role]) + f', the {role} with the adapters'}"
        for role, path in report.targets.items()
    ]
    lines += [f"  {count} layers of {name}" for name, count in report.layers.items()]
    lines += [f"  {len(report.skipped)} layers have no place in these models, e.g. {report.skipped[0]}"] if report.skipped else []
    return lines + [f"  note: {note}" for note in report.notes]
