"""Runs the drawings of flux_minimal_inference.py through the native pipeline: PNG files with their settings inside."""

import secrets
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import torch

from fluxsmith.dialects.sd_scripts.drawing import Drawing
from fluxsmith.errors import ConfigError
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.generate.request import Request
from fluxsmith.io.durable import Disk
from fluxsmith.io.images import write_png
from fluxsmith.io.metadata import png_text

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SEEDS = 2**32


class Artist:
    """A loaded model that draws one drawing after the other."""

    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing
        self.pipeline = Pipeline.load(drawing.model, dtype=TYPES[drawing.dtype] if drawing.dtype else None)
        for path, strength in drawing.loras:
            self.pipeline.load_lora(path, strength)
        if drawing.is_merged:
            for made in self.pipeline.loras:
                made.merge()

    def draw(self, drawing: Drawing) -> tuple[Path, int]:
        """One picture; returns its file and seed."""
        if drawing.loras != self.drawing.loras:
            self._strengths(drawing)
        seed = secrets.randbelow(SEEDS) if drawing.seed is None else drawing.seed
        picture = self.pipeline.generate(Request(drawing.prompt, seed=seed, **drawing.settings))
        path = free_name(Path(drawing.output_dir))
        Disk().make_folder(path.parent)
        loras = [list(lora) for lora in drawing.loras]
        write_png(path, picture.image, png_text({**picture.settings, "loras": loras}, model=Path(drawing.model["path"]).name))
        return path, seed

    def _strengths(self, drawing: Drawing) -> None:
        if drawing.is_merged:
            raise ConfigError("merged LoRAs keep their strength", fix="leave out --merge_lora_weights to change it with --m")
        for made, (_, strength) in zip(self.pipeline.loras, drawing.loras, strict=True):
            made.scale(strength)
        self.drawing = drawing


def free_name(folder: Path) -> Path:
    """The time as a file name, as sd-scripts has it; two pictures of one second get different names."""
    stem = datetime.now().strftime("%Y%m%d_%H%M%S")
    names = (folder / f"{stem}{'' if number == 0 else f'_{number}'}.png" for number in range(1_000_000))
    return next(path for path in names if not path.exists())


def lines_until_empty(lines: Iterable[str]) -> Iterable[str]:
    """Prompts until the first empty line."""
    for line in lines:
        if not line.strip():
            return
        yield line.strip()
