"""`fluxsmith lora convert` and `resize`: the same adapter in other names, or of another rank."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from fluxsmith.cli.arguments import AdapterFormat, AsJson, Device, Overwrite, Target, WrittenDtype
from fluxsmith.io.durable import readable_size

app = typer.Typer(help="Change adapter files.", no_args_is_help=True)
Source = Annotated[Path, typer.Argument(help="Adapter file of any format.")]


@app.callback()
def lora() -> None:
    """Change adapter files."""


@app.command("convert")
def convert_lora(
    source: Source,
    *,
    out: Target,
    to: Annotated[AdapterFormat, typer.Option("--to", help="Format to write: kohya is sd-scripts', peft is diffusers'.")],
    base: Annotated[str, typer.Option("--base", help="Its model, where the file does not tell a layer's size (XLabs).")] = "",
    dtype: Annotated[WrittenDtype, typer.Option("--dtype", help="Type of the factors.")] = "keep",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in another format. Example: fluxsmith lora convert cats.safetensors --to peft -o cats-diffusers.safetensors"""
    from fluxsmith.tools.convert import ConvertRequest, convert

    report = convert(ConvertRequest(source, out, to, base=base or None, dtype=dtype, overwrite=overwrite))
    if as_json:
        print(json.dumps(report.as_record(), indent=1))
        return
    sizes = f"{readable_size(report.bytes_before)} -> {readable_size(report.bytes_after)}"
    print(f"{report.target}: {report.layers} layers, {report.source_format} -> {report.format}, {sizes}")
    if report.rounded:
        print("  note: strengths were multiplied into 16-bit factors, which rounds them once more; --dtype fp32 avoids that")
    print(f"  {report.verdict}")


@app.command("resize")
def resize_lora(  # noqa: PLR0913  a verb has as many arguments as options
    source: Source,
    *,
    out: Target,
    rank: Annotated[int, typer.Option("--rank", help="New rank; the largest one with --method.")],
    method: Annotated[
        Literal["ratio", "energy", "sum"] | None,
        typer.Option("--method", help="Rank by singular values: above the largest / P, or P of their norm or of their sum."),
    ] = None,
    parameter: Annotated[float | None, typer.Option("--parameter", "-p", help="P: 2 or more for ratio, a share for the others.")] = None,
    form: Annotated[AdapterFormat | None, typer.Option("--format", help="Names; those of the source.")] = None,
    dtype: Annotated[WrittenDtype, typer.Option("--dtype", help="Type of the factors.")] = "keep",
    device: Device = "cpu",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="What each layer keeps.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Change the rank of a LoRA. Example: fluxsmith lora resize cats.safetensors --rank 32 --method energy -p 0.95 -o small.safetensors"""
    from fluxsmith.tools.resize import ResizeRequest, resize

    report = resize(ResizeRequest(source, out, rank, method, parameter, form, dtype, device, overwrite=overwrite))
    if as_json:
        print(json.dumps(report.as_record(), indent=1))
        return
    mean, least = report.kept
    ranks = [layer.rank for layer in report.layers]
    spread = f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    print(f"{report.target}: {len(report.layers)} pairs, {spread}; keeps {mean:.2%} of the norm on average, {least:.2%} at least")
    for layer in report.layers if verbose else ():
        print(f"  {layer.path}: rank {layer.before} -> {layer.rank}, sum kept {layer.sum:.2%}, norm kept {layer.norm:.2%}")
    print(f"  {report.verdict}")
