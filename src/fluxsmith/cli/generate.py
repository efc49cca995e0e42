"""`fluxsmith generate`: pictures from prompts, with LoRAs, image to image and grids."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fluxsmith.cli.arguments import AsJson, weighted
from fluxsmith.config.load import load_model
from fluxsmith.config.section import PluginConfig
from fluxsmith.errors import ConfigError
from fluxsmith.io.identify import identify

Weighted = tuple[str, float]


def command(  # noqa: PLR0913  a verb has as many arguments as options
    run: Annotated[Path | None, typer.Argument(help="A run file whose model section is used; or give --model.")] = None,
    *,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw; several make a grid.")],
    model: Annotated[str, typer.Option("--model", help="Transformer file, folder or hub id; flux-shapes is bundled.")] = "",
    preset: Annotated[
        str, typer.Option("--preset", help="krea, kontext, ... (with --model); dev, schnell and Chroma are recognised.")
    ] = "",
    clip_l: Annotated[str, typer.Option("--clip-l", help="CLIP-L file.")] = "",
    t5xxl: Annotated[str, typer.Option("--t5xxl", help="T5-XXL file.")] = "",
    ae: Annotated[str, typer.Option("--ae", help="Autoencoder file.")] = "",
    lora: Annotated[list[str] | None, typer.Option("--lora", metavar="FILE[:WEIGHT]", help="A LoRA; may be repeated.")] = None,
    negative: Annotated[str, typer.Option("--negative", "-n", help="What to avoid (with --cfg).")] = "",
    steps: Annotated[int | None, typer.Option("--steps", help="Sampling steps; the model's default.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="Embedded guidance; the model's default.")] = None,
    cfg: Annotated[
        float | None, typer.Option("--cfg", help="True guidance; 1 is off (but for Chroma), others cost twice the time.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="Seed of the noise; several make a grid.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Pixels, a multiple of 16; that of --image or the model's default.")] = None,
    height: Annotated[int | None, typer.Option("--height", help="Pixels, a multiple of 16.")] = None,
    shift: Annotated[str, typer.Option("--shift", help="flux, none, or a number; the model's default.")] = "",
    sampler: Annotated[str, typer.Option("--sampler", help="euler or heun.")] = "euler",
    image: Annotated[Path | None, typer.Option("--image", help="Start of image to image.")] = None,
    strength: Annotated[float | None, typer.Option("--strength", help="How much of --image is redrawn, 0..1; 0.6 by default.")] = None,
    tile: Annotated[
        int | None, typer.Option("--tile", help="Autoencoder tile in pixels; 0 never tiles; by default from 1536 x 1536 on.")
    ] = None,
    step_cache: Annotated[
        str,
        typer.Option("--step-cache", metavar="KIND:THRESHOLD", help="Skip similar steps: teacache:0.4 or first_block:0.1; off by default."),
    ] = "",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="Where to draw.")] = "auto",
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG file, or folder for several.")] = Path("out.png"),
    as_json: AsJson = False,
) -> None:
    """Draw. Example: fluxsmith generate --model flux-shapes --prompt "a large red circle at center on a grey background"."""
    section = _model_section(run, model, {"preset": preset, "clip_l": clip_l, "t5xxl": t5xxl, "ae": ae})
    from fluxsmith.generate.job import Job, draw_all

    settings = {
        "negative": negative, "steps": steps, "guidance": guidance, "cfg": cfg, "width": width, "height": height,
        "shift": _shift(shift), "sampler": sampler, "tile": tile,
        "cache": _step_cache(step_cache),
        "strength": strength if strength is not None else 0.6 if image else 1.0,
    }  # fmt: skip
    loras = tuple(weighted(text, "--lora") for text in lora or ())
    job = Job(section, tuple(prompt), tuple(seed or (0,)), settings, loras=loras, image=image, device=device, out=out)
    for record in draw_all(job):
        typer.echo(json.dumps(record) if as_json else _line(record))


def _line(record: dict[str, Any]) -> str:
    if record.get("grid"):
        return f"{record['path']}  all of them"
    skipped = f"  skipped {record['forwards_skipped']} of {record['forwards']}" if record.get("cache") else ""
    return f"{record['path']}  {record['seconds']:.1f} s  seed {record['seed']}{skipped}"


def _model_section(run: Path | None, model: str, files: dict[str, str]) -> PluginConfig:
    """The model section of a run file, or one made of the options."""
    if run is not None and model:
        raise ConfigError("a run file and --model are both given", fix="drop one of them")
    if run is not None:
        return load_model(run)
    if not model:
        raise ConfigError("no model is given", fix="give a run file, or --model FILE (or --model flux-shapes)")
    if model == "flux-shapes":
        return load_model({"model": {"type": "flux1", "preset": "flux-shapes"}})
    given = {key: value for key, value in files.items() if value}
    return load_model({"model": {**_member(model, given), "path": model, **given}})


def _member(model: str, given: dict[str, str]) -> dict[str, str]:
    """Family and preset of a transformer file, told by its header; what is no local file is FLUX.1-dev unless --preset says otherwise."""
    path = Path(model).expanduser()
    if not path.exists():
        return {"type": "flux1"}
    found = identify(path)
    if found.family == "chroma":
        if "clip_l" in given:
            raise ConfigError("--clip-l has no effect", where=model, why="this is Chroma, which has no CLIP", fix="leave it out")
        return {"type": "chroma"}
    return {"type": "flux1", "preset": "schnell" if found.variant == "schnell" else "dev"}


def _shift(text: str) -> str | float | None:
    if text in ("", "flux", "none"):
        return text or None
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--shift {text}", why="it is flux, none or a number", fix="leave it out for the model's default") from None


def _step_cache(text: str) -> dict[str, Any] | None:
    if not text:
        return None
    name, _, number = text.partition(":")
    try:
        return {"type": name, "threshold": float(number)}
    except ValueError:
        raise ConfigError(f"--step-cache {text}", why="it is a kind and a threshold", fix="write teacache:0.4") from None
