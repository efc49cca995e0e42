"""`fluxsmith generate`: pictures from prompts, with LoRAs, image to image and grids."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from fluxsmith.cli import drawing_options as options
from fluxsmith.cli.arguments import AsJson, weighted
from fluxsmith.cli.control_options import controls, entry
from fluxsmith.config.load import load_model, load_quant
from fluxsmith.config.section import PluginConfig
from fluxsmith.errors import ConfigError
from fluxsmith.io.identify import identify

Weighted = tuple[str, float]
MEMBERS: dict[tuple[str, str], tuple[str, str]] = {  # family and variant by structure -> type and preset of the model section
    ("chroma", "chroma"): ("chroma", ""),
    ("flux1", "schnell"): ("flux1", "schnell"),
    ("flux1", "fill"): ("flux1", "fill"),
    ("flux1", "canny-depth"): ("flux1", "canny"),
    ("flex", "preview"): ("flux1", "flex2"),
    ("step1x", "edit"): ("step1x", "edit"),
    ("nexus_gen", "edit"): ("nexus_gen", "edit"),
    ("nexus_gen", "generation"): ("nexus_gen", "generation"),
}


def command(  # noqa: PLR0913  a verb has as many arguments as options
    run: Annotated[Path | None, typer.Argument(help="A run file whose model and controls are used; or give --model.")] = None,
    *,
    prompt: options.Prompt,
    model: options.Model = "",
    preset: options.Preset = "",
    clip_l: options.ClipL = "",
    t5xxl: options.T5Xxl = "",
    ae: options.Ae = "",
    part: options.Part = None,
    lora: options.Lora = None,
    lora_fusion: options.LoraFusion = "",
    negative: options.Negative = "",
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    cfg: options.Cfg = None,
    seed: options.Seed = None,
    width: options.Width = None,
    height: options.Height = None,
    shift: options.Shift = "",
    sampler: options.Sampler = "euler",
    image: options.Image = None,
    strength: options.Strength = None,
    tile: options.Tile = None,
    step_cache: options.StepCache = "",
    denoise_tile: options.DenoiseTile = None,
    denoise_overlap: options.DenoiseOverlap = None,
    control: options.Control = None,
    device: options.Device = "auto",
    vram_limit: options.VramLimit = "auto",
    offload_dir: options.OffloadDir = None,
    quant: options.Quant = "",
    compile: options.Compile = False,
    attention: options.Attention = "auto",
    out: options.Out = Path("out.png"),
    as_json: AsJson = False,
) -> None:
    """Draw. Example: fluxsmith generate --model flux-shapes --prompt "a large red circle at center on a grey background"."""
    section = _model_section(run, model, {"preset": preset, "clip_l": clip_l, "t5xxl": t5xxl, "ae": ae, **_parts(part or [])})
    from fluxsmith.generate.job import Job, draw_all

    settings = {
        "negative": negative, "steps": steps, "guidance": guidance, "cfg": cfg, "width": width, "height": height,
        "shift": _shift(shift), "sampler": sampler, "tile": tile, "denoise_tile": denoise_tile, "denoise_overlap": denoise_overlap,
        "cache": _step_cache(step_cache),
        "strength": strength if strength is not None else 0.6 if image else 1.0,
    }  # fmt: skip
    loras = tuple(weighted(text, "--lora") for text in lora or ())
    place = {"device": device, "vram_limit": _limit(vram_limit), "attention": attention, "compile": compile, "offload_dir": offload_dir}
    place |= {"quant": load_quant(entry(quant))} if quant else {}
    entries = controls(run, control or ())
    made_of = {"loras": loras, "fusion": lora_fusion, "controls": entries, "image": image}
    job = Job(section, tuple(prompt), tuple(seed or (0,)), settings, **made_of, place=place, out=out)
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
    family, preset = MEMBERS.get((found.family, found.variant), ("flux1", "dev"))
    if family == "chroma" and "clip_l" in given:
        raise ConfigError("--clip-l has no effect", where=model, why="this is Chroma, which has no CLIP", fix="leave it out")
    return {"type": family, **({"preset": preset} if preset else {})}


def _parts(options: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in options]
    wrong = next((text for text, (name, sign, path) in zip(options, pairs, strict=True) if not (name and sign and path)), None)
    if wrong is not None:
        raise ConfigError(f"--part {wrong}", why="it is the name of a part and its path", fix="write --part qwen=FOLDER")
    return {name: path for name, _, path in pairs}


def _shift(text: str) -> str | float | None:
    if text in ("", "flux", "none"):
        return text or None
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--shift {text}", why="it is flux, none or a number", fix="leave it out for the model's default") from None


def _limit(text: str) -> float | str | None:
    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < math.inf:
        raise ConfigError(f"--vram-limit {text}", why="it is auto, none or a number of GiB", fix="write --vram-limit 8")
    return limit


def _step_cache(text: str) -> dict[str, Any] | None:
    if not text:
        return None
    name, _, number = text.partition(":")
    try:
        return {"type": name, "threshold": float(number)}
    except ValueError:
        raise ConfigError(f"--step-cache {text}", why="it is a kind and a threshold", fix="write teacache:0.4") from None
