"""`fluxsmith model ...`: what weights files are, and the same in fewer bits. Example: `fluxsmith model identify flux1-dev.safetensors`."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fluxsmith.cli.arguments import AsJson, Device, DryRun, Overwrite, Target
from fluxsmith.errors import FluxsmithError
from fluxsmith.io.durable import readable_size
from fluxsmith.io.identify import identify

app = typer.Typer(help="Look at model files, and write them in fewer bits.", no_args_is_help=True)
UNKNOWN = 4  # exit code: a file is unreadable or of no known kind


@app.callback()
def model() -> None:
    """Look at model files, and write them in fewer bits."""


@app.command("identify")
def identify_files(
    files: Annotated[list[str], typer.Argument(help="Weights files, shards, or folders.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for one file, a list for several.")] = False,
) -> None:
    """Say which model or adapter each file is, from its header alone. Exit code 4 if one is unreadable or unknown."""
    records = [_record(file) for file in files]
    if as_json:
        print(json.dumps(records[0] if len(records) == 1 else records, indent=1))
    else:
        for record in records:
            print(_text(record))
    if any(record["role"] == "unknown" for record in records):
        raise typer.Exit(UNKNOWN)


@app.command("quantize")
def quantize_file(  # noqa: PLR0913  as many as it has options
    model: Annotated[str, typer.Argument(help="Transformer, CLIP-L or T5: a file, folder or hub id.")],
    out: Target,
    kind: Annotated[Literal["fp8", "int8", "int4", "int2", "nf4"], typer.Option("--to", help="Kind of quantisation.")],
    role: Annotated[Literal["dit", "clip_l", "t5xxl"] | None, typer.Option("--role", help="Which model of an all-in-one file.")] = None,
    modulation: Annotated[
        Literal["same", "int8", "keep"] | None, typer.Option("--modulation", help="Modulation layers; by default int8 beside 4 and 2 bits.")
    ] = None,
    embedders: Annotated[
        Literal["same", "int8", "keep"] | None, typer.Option("--embedders", help="Layers outside the blocks; by default kept.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Pattern of layers that stay as they are; may be repeated.")
    ] = None,
    group: Annotated[int | None, typer.Option("--group", help="Inputs under one scale, for int4 and int2: 32, 64 or 128.")] = None,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="int4 and int2 with the same range on both sides of zero.")] = False,
    dtype: Annotated[Literal["keep", "fp32", "fp16", "bf16"], typer.Option("--dtype", help="Type of what is not quantised.")] = "keep",
    device: Device = "cpu",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write a model in fewer bits; layer by layer, so little memory is needed. A run with the same `quant` takes them as they are."""
    from fluxsmith.tools.quantize import QuantizeRequest, quantize

    asked = {"modulation": modulation, "embedders": embedders, "exclude": exclude, "group": group, "symmetric": symmetric or None}
    options = {name: value for name, value in asked.items() if value is not None}
    request = QuantizeRequest(
        model, out, kind, options, role=role or "", dtype=dtype, device=device, overwrite=overwrite, is_dry_run=dry_run
    )
    report = quantize(request)
    if as_json:
        print(json.dumps(report.as_record(), indent=1))
        return
    layers = ", ".join(f"{count} layers in {form}" for form, count in sorted(report.layers.items()))
    sizes = f"{readable_size(report.bytes_before)} -> {readable_size(report.bytes_after)}"
    print(f"{'would write' if dry_run else 'wrote'} {report.target}: {layers}, {sizes}")
    for note in report.notes:
        print(f"  note: {note}")


def _record(file: str) -> dict[str, Any]:
    try:
        found = identify(Path(file))
    except FluxsmithError as error:
        empty = {"family": "unknown", "role": "unknown", "variant": "", "key_style": "", "prefix": "", "notes": [], "sizes": {}}
        return {"path": file, **empty, "problems": [str(problem) for problem in error.problems], "is": "unreadable"}
    return {**found.as_record(), "path": file, "is": found.describe()}


def _text(record: dict[str, Any]) -> str:
    lines = [f"{record['path']}: {record['is']}"]
    sizes = record["sizes"]
    if sizes:
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in sizes["dtypes"].items())
        lines.append(f"  {sizes['tensors']} tensors, {sizes['parameters']:,} parameters, {dtypes}")
        shown = {name: value for name, value in sizes.items() if name not in ("tensors", "parameters", "bytes", "dtypes", "roles", "parts")}
        lines += ["  " + ", ".join(f"{name} {value}" for name, value in shown.items())] if shown else []
        others = sizes.get("roles", {}) | sizes.get("parts", {})
        lines += [f"  {role}: keys under {prefix}" if prefix else f"  {role}: in it too" for role, prefix in others.items()]
    lines += [f"  problem: {text}" for text in record["problems"]]
    lines += [f"  note: {text}" for text in record["notes"]]
    return "\n".join(lines)
