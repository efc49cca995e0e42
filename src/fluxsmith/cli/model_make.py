"""`fluxsmith model convert` and `merge`: a model as one file in the original names, and weighted sums of models."""

import json
from typing import Annotated, Literal

import typer

from fluxsmith.cli.arguments import AsJson, Device, Overwrite, Target, WrittenDtype, weighted
from fluxsmith.cli.progress import progress_line
from fluxsmith.io.durable import readable_size

app = typer.Typer(help="Make model files.", no_args_is_help=True)
Role = Annotated[Literal["dit", "clip_l", "t5xxl", "ae"], typer.Option("--role", help="Which part of the model.")]
Dtype = Annotated[WrittenDtype, typer.Option("--dtype", help="Type to write; keep is that of the (first) source.")]


@app.callback()
def model() -> None:
    """Make model files."""


@app.command("convert")
def convert_files(
    source: Annotated[str, typer.Argument(help="File, shards, folder of diffusers, all-in-one checkpoint, or hub id.")],
    *,
    out: Target,
    role: Role = "dit",
    dtype: Dtype = "keep",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a model as one file in the original names. Example: fluxsmith model convert FLUX.1-dev/ -o flux1-dev.safetensors"""
    from fluxsmith.tools.convert import ModelConvertRequest, convert_model

    with progress_line() as progress:
        made = convert_model(ModelConvertRequest(source, out, role, dtype, overwrite), progress)
    shown = f"{made['target']}: {made['tensors']} tensors, {readable_size(made['bytes'])}, from {made['source']}"
    print(json.dumps(made, indent=1) if as_json else shown)


@app.command("merge")
def merge_files(
    models: Annotated[list[str], typer.Argument(metavar="FILE[:SHARE]...", help="Models of one structure; shares usually add up to 1.")],
    *,
    out: Target,
    role: Role = "dit",
    dtype: Dtype = "keep",
    device: Device = "cpu",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """The weighted sum of models. Example: fluxsmith model merge a.safetensors:0.5 b.safetensors:0.5 -o ab.safetensors"""
    from fluxsmith.tools.blend import BlendRequest, blend

    shares = tuple(weighted(text, "model") for text in models)
    with progress_line() as progress:
        made = blend(BlendRequest(shares, out, role, dtype, device, overwrite), progress)
    shown = f"{made['target']}: {made['tensors']} tensors, {readable_size(made['bytes'])}"
    print(json.dumps(made, indent=1) if as_json else shown)
