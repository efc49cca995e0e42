"""Several pictures in one go: every prompt with every seed, saved as PNG with their settings inside, and as a grid."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from fluxsmith.config.choice import realise
from fluxsmith.config.control import ControlConfig
from fluxsmith.config.section import PluginConfig
from fluxsmith.errors import ConfigError, Problem
from fluxsmith.generate.controls import check_early
from fluxsmith.generate.grid import Cell, grid
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.generate.request import MULTIPLE, Request
from fluxsmith.io.images import read_image, write_png
from fluxsmith.io.metadata import png_text

FUSED = 2  # LoRAs


@dataclass(frozen=True)
class Job:
    """What the generate command was asked for; `settings` are fields of Request."""

    model: PluginConfig
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    loras: tuple[tuple[str, float], ...] = ()
    fusion: str = ""
    """A LoRAFusion file."""
    controls: tuple[ControlConfig, ...] = ()
    image: Path | None = None
    place: Mapping[str, Any] = field(default_factory=dict)
    """Where to draw: `device`, `vram_limit` and `attention` of Pipeline.load."""
    out: Path = Path("out.png")

    def requests(self) -> list[Request]:
        """One request a picture, rows by prompt and columns by seed. Raises ConfigError for settings, DataError for the picture."""
        start = read_image(self.image).image if self.image else None
        side = int(realise(self.model).sampling_defaults()["side"])
        shown = start.size if start else self._natural_size(side)
        width, height = picture_size(self.settings.get("width"), self.settings.get("height"), side=side, shown=shown)
        settings = {**self.settings, "width": width, "height": height, "image": start}
        if settings.get("cfg") is None:
            settings["cfg"] = float(realise(self.model).sampling_defaults().get("cfg", 1.0))
        requests = [Request(prompt, seed=seed, **settings) for prompt in self.prompts for seed in self.seeds]
        problems = dict.fromkeys(problem for request in requests for problem in _problems(request))
        if problems:
            raise ConfigError("these pictures cannot be drawn", problems=tuple(problems))
        return requests

    def _natural_size(self, side: int) -> tuple[int, int] | None:
        sizes = (realise(control).natural_size(side) for control in self.controls)
        return next((size for size in sizes if size is not None), None)


def picture_size(width: int | None, height: int | None, *, side: int, shown: tuple[int, int] | None) -> tuple[int, int]:
    """Width and height where they were not asked for: those of the picture that is shown (at most side x side pixels), or a square."""
    if width is not None and height is not None:
        return width, height
    if shown is None:
        return width or height or side, height or width or side
    ratio = shown[0] / shown[1]
    if width is not None:
        return width, _multiple(width / ratio)
    if height is not None:
        return _multiple(height * ratio), height
    shrink = min(1.0, side / math.sqrt(shown[0] * shown[1]))
    return _multiple(shown[0] * shrink), _multiple(shown[1] * shrink)


def _multiple(length: float) -> int:
    return max(MULTIPLE, round(length / MULTIPLE) * MULTIPLE)


def _problems(request: Request) -> tuple[Problem, ...]:
    try:
        request.check()
    except ConfigError as error:
        return error.problems
    return ()


def draw_all(job: Job) -> Iterator[dict[str, Any]]:
    """Draw and save; yields one record a picture, and one for the grid where there are several."""
    requests = job.requests()
    several = len(requests) > 1
    is_folder = job.out.is_dir() or not job.out.suffix
    if not is_folder and several:
        raise ConfigError(f"{len(requests)} pictures and one file name", where=str(job.out), fix="give a folder with --out")
    if not is_folder and job.out.suffix.lower() != ".png":
        raise ConfigError("pictures are written as PNG", where=str(job.out), fix=f"use {job.out.with_suffix('.png')}")
    if job.fusion and len(job.loras) < FUSED:
        raise ConfigError("--lora-fusion has no effect", why=f"it weighs {FUSED} LoRAs or more against each other", fix="give more --lora")
    check_early(job.model, job.controls, requests, loras=job.loras)
    pipeline = Pipeline.load(job.model, controls=job.controls, **job.place)
    for path, weight in job.loras:
        pipeline.load_lora(path, weight)
    if job.fusion:
        pipeline.fuse_loras(job.fusion)
    cells = []
    for number, request in enumerate(requests):
        picture = pipeline.generate(request)
        path = job.out / f"{number:03d}_s{request.seed}.png" if is_folder else job.out
        made_of = {"loras": [list(lora) for lora in job.loras], "control_models": [as_record(one) for one in job.controls]}
        made_of |= {"lora_fusion": job.fusion} if job.fusion else {}
        record = {**picture.settings, **made_of, "seconds": picture.seconds, "path": str(path)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, picture.image, png_text({**picture.settings, **made_of}, model=model_name(job.model)))
        cells.append(Cell(picture.image, request.prompt, f"seed {request.seed}"))
        yield record
    if several:
        path = job.out / "grid.png"
        write_png(path, grid(cells, columns=len(job.seeds)), {})
        yield {"path": str(path), "seconds": 0.0, "seed": job.seeds[0], "grid": True}


def as_record(control: ControlConfig) -> dict[str, Any]:
    """A control with what it was given, for the settings in a picture."""
    return control.model_dump(mode="json", exclude_defaults=True) | {"type": control.type}


def model_name(model: PluginConfig) -> str:
    """What the PNG says drew it: the file's name, or the preset."""
    values = model.model_dump()
    return Path(values["path"]).name if values.get("path") else str(values.get("preset", ""))


def save_grid(path: Path, pictures: list[Image.Image], labels: list[str], *, columns: int) -> None:
    """A labelled grid of pictures as one PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, grid([Cell(p, "", label) for p, label in zip(pictures, labels, strict=True)], columns=columns), {})
