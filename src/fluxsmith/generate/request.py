"""What a user asks for (Request) and what they get (Picture), with every setting that made it."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from PIL import Image

from fluxsmith.errors import ConfigError, Problem


@dataclass(frozen=True)
class Request:
    """One picture. None means the model's own default (steps, guidance, shift)."""

    prompt: str
    negative: str = ""
    width: int = 1024
    height: int = 1024
    steps: int | None = None
    guidance: float | None = None  # embedded guidance (dev)
    cfg: float = 1.0  # true classifier-free guidance; 1 is off
    seed: int = 0
    shift: Literal["flux", "none"] | float | None = None
    sampler: str = "euler"
    image: Image.Image | None = None  # start of image to image
    strength: float = 1.0  # 1 ignores `image`, 0.3 changes little
    tile: int = 0  # side of an autoencoder tile in pixels; 0 decodes in one piece
    overlap: int = 128  # pixels shared by neighbouring tiles

    def check(self) -> None:
        """Raise one ConfigError with everything that is wrong."""
        problems = [
            Problem(f"{name} = {value}", why="sides are multiples of 16 and at least 16", fix=f"use {max(16, round(value / 16) * 16)}")
            for name, value in (("width", self.width), ("height", self.height))
            if value < 16 or value % 16
        ]
        if not 0 < self.strength <= 1:
            problems.append(Problem(f"strength = {self.strength}", why="it must be above 0 and at most 1", fix="use 0.6"))
        if self.steps is not None and self.steps < 1:
            problems.append(Problem(f"steps = {self.steps}", fix="use at least 1"))
        if self.strength < 1 and self.image is None:
            problems.append(Problem("strength without a starting picture", fix="give an image, or leave strength out"))
        if self.tile and self.tile - self.overlap < 16:
            problems.append(Problem(f"tile = {self.tile}, overlap = {self.overlap}", fix="use an overlap of a quarter of the tile"))
        if problems:
            raise ConfigError(str(problems[0]), problems=tuple(problems))

    def settings(self) -> dict[str, Any]:
        """JSON-ready settings, the starting picture left out."""
        values = asdict(replace(self, image=None))
        values.pop("image")
        return {**values, "image_to_image": self.image is not None}


@dataclass(frozen=True)
class Picture:
    """A finished picture and what made it."""

    image: Image.Image
    request: Request
    seconds: float

    @property
    def settings(self) -> dict[str, Any]:
        """What is written into the PNG."""
        return self.request.settings()
