"""`fluxsmith generate`: pictures from prompts, with LoRAs, image to image and grids."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fluxsmith.cli.arguments import AsJson
from fluxsmith.config.load import load_model
from fluxsmith.config.section import PluginConfig
from fluxsmith.errors import ConfigError

Weighted = tuple[str, float]


def command(
    run: Annotated[Path | None, typer.Argument(help="A run file whose model section is used; or give --model.")] = None,
    *,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw; several make a grid.")],
    model: Annotated[str, typer.Option("--model", help="Transformer file, folder or hub id; flux-shapes is bundled.")] = "",
    preset: Annotated[str, typer.Option("--preset", help="dev, schnell, krea, ... (with --model).")] = "dev",
    clip_l: Annotated[str, typer.Option("--clip-l", help="CLIP-L file.")] = "",
    t5xxl: Annotated[str, typer.Option("--t5xxl", help="T5-XXL file.")] = "",
    ae: Annotated[str, typer.Option("--ae", help="Autoencoder file.")] = "",
    lora: Annotated[list[str] | None, typer.Option("--lora", metavar="FILE[:WEIGHT]", help="A LoRA; may be repeated.")] = None,
    negative: Annotated[str, typer.Option("--negative", "-n", help="What to avoid (with --cfg).")] = "",
    steps: Annotated[int | None, typer.Option("--steps", help="Sampling steps; the model's default.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="Embedded guidance; the model's default.")] = None,
    cfg: Annotated[float, typer.Option("--cfg", help="True guidance; 1 is off, other values cost twice the time.")] = 1.0,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="Seed of the noise; several make a grid.")] = None,
    width: Annotated[int, typer.Option("--width", help="Pixels, a multiple of 16.")] = 1024,
    height: Annotated[int, typer.Option("--height", help="Pixels, a multiple of 16.")] = 1024,
    shift: Annotated[str, typer.Option("--shift", help="flux, none, or a number; the model's default.")] = "",
    sampler: Annotated[str, typer.Option("--sampler", help="euler or heun.")] = "euler",
    image: Annotated[Path | None, typer.Option("--image", help="Start of image to image.")] = None,
    strength: Annotated[float, typer.Option("--strength", help="How much of the starting picture is redrawn, 0..1.")] = 0.6,
    tile: Annotated[int, typer.Option("--tile", help="Autoencoder tile in pixels for large pictures; 0 is off.")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG file, or folder for several.")] = Path("out.png"),
    as_json: AsJson = False,
) -> None:
    """Draw. Example: fluxsmith generate --model flux-shapes --prompt "a large red circle at center on a grey background" --width 64 --height 64."""
    section = _model_section(run, model, {"preset": preset, "clip_l": clip_l, "t5xxl": t5xxl, "ae": ae})
    from fluxsmith.generate.job import Job, draw_all

    settings = {
        "negative": negative, "steps": steps, "guidance": guidance, "cfg": cfg, "width": width, "height": height,
        "shift": _shift(shift), "sampler": sampler, "strength": strength if image else 1.0, "tile": tile,
    }  # fmt: skip
    loras = tuple(_weighted(text) for text in lora or ())
    job = Job(section, tuple(prompt), tuple(seed or (0,)), settings, loras=loras, image=image, device=device, out=out)
    for record in draw_all(job):
        typer.echo(json.dumps(record) if as_json else f"{record['path']}  {record['seconds']:.1f} s  seed {record['seed']}")


def _model_section(run: Path | None, model: str, files: dict[str, str]) -> PluginConfig:
    """The model section of a run file, or one made of the options."""
    if run is not None:
        return load_model(run)
    if not model:
        raise ConfigError("no model is given", fix="give a run file, or --model FILE (or --model flux-shapes)")
    if model == "flux-shapes":
        return load_model({"model": {"type": "flux1", "preset": "flux-shapes"}})
    return load_model({"model": {"type": "flux1", "path": model, **{key: value for key, value in files.items() if value}}})


def _weighted(text: str) -> Weighted:
    """FILE or FILE:WEIGHT."""
    path, _, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if path else (text, 1.0)
    except ValueError:
        return text, 1.0


def _shift(text: str) -> str | float | None:
    if text in ("", "flux", "none"):
        return text or None
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--shift {text}", why="it is flux, none or a number", fix="leave it out for the model's default") from None
