"""What a user asks for (Request) and what they get (Picture), with every setting that made it."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from fluxsmith.errors import ConfigError, Problem
from fluxsmith.generate.samplers import SAMPLERS
from fluxsmith.generate.step_cache import option_problems
from fluxsmith.models.tiling import Tiling

MULTIPLE = 16  # pixels: the autoencoder's 8 times the transformer's 2 x 2 patches
LARGE = 1536 * 1536  # pixels; larger pictures pass the autoencoder in tiles unless `tile` says otherwise
SEEDS = 2**63


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
    image: Image.Image | None = None  # start of image to image, cropped at the centre to the request's shape
    control_image: Image.Image | None = None  # condition of the control models, cropped likewise
    strength: float = 1.0  # 1 ignores `image`, 0.3 changes little
    tile: int | None = None  # side of an autoencoder tile in pixels; 0 never tiles, None tiles pictures above 1536 x 1536
    overlap: int | None = None  # pixels shared by neighbouring tiles; None is a quarter of the tile
    controls: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by name: options of a loaded control, such as its image
    denoise_tile: int | None = None  # side of a window in pixels that is denoised by itself; None denoises the picture as a whole
    denoise_overlap: int | None = None  # pixels shared by neighbouring windows; None is half of one
    sigmas: tuple[float, ...] | None = None  # noise levels from the first to 0, in place of steps, shift and the start by strength
    noise: Tensor | None = field(default=None, compare=False)  # unit noise (1, 16, H/8, W/8) to start from; None: that of the seed
    cache: Mapping[str, Any] | None = None  # step cache: {"type": "teacache" or "first_block", "threshold": 0.4}; None computes all

    def check(self) -> None:
        """Raise one ConfigError with everything that is wrong."""
        problems = (*self._sizes(), *self._numbers(), *self._pairs(), *option_problems(self.cache))
        if problems:
            raise ConfigError(str(problems[0]), problems=problems)

    def tiling(self) -> Tiling | None:
        """How the autoencoder is tiled, or None for one piece."""
        tile = (1024 if self.width * self.height > LARGE else 0) if self.tile is None else self.tile
        return Tiling(tile, tile // 4 if self.overlap is None else self.overlap) if tile else None

    def windows(self) -> Tiling | None:
        """How denoising is tiled, or None for one piece."""
        tile = self.denoise_tile
        return Tiling(tile, tile // 2 if self.denoise_overlap is None else self.denoise_overlap) if tile else None

    def _sizes(self) -> Iterator[Problem]:
        for name, value in (("width", self.width), ("height", self.height)):
            if value < MULTIPLE or value % MULTIPLE:
                fix = f"use {max(MULTIPLE, round(value / MULTIPLE) * MULTIPLE)}"
                yield Problem(f"{name} = {value}", why=f"sides are multiples of {MULTIPLE}", fix=fix)

    def _numbers(self) -> Iterator[Problem]:
        if self.steps is not None and self.steps < 1:
            yield Problem(f"steps = {self.steps}", fix="use at least 1")
        if not 0 < self.strength <= 1:
            yield Problem(f"strength = {self.strength}", why="it must be above 0 and at most 1", fix="use 0.6")
        for name, value in (("guidance", self.guidance), ("cfg", self.cfg)):
            if value is not None and not (value >= 0 and math.isfinite(value)):
                yield Problem(f"{name} = {value}", why="it must be 0 or more", fix="use 3.5")
        if self.sigmas is not None and not _is_schedule(self.sigmas):
            why = "they start at 1 or below, fall, and end with 0"
            yield Problem(f"sigmas = {self.sigmas}", why=why, fix="use (1.0, 0.75, 0.5, 0.25, 0.0), or leave them out")
        if not 0 <= self.seed < SEEDS:
            yield Problem(f"seed = {self.seed}", why="seeds go from 0 to 2^63 - 1", fix="use 42")
        if not _is_shift(self.shift):
            yield Problem(f"shift = {self.shift}", why="it is flux, none or a number above 0", fix="leave it out for the model's default")
        if self.sampler not in SAMPLERS:
            yield Problem(f"sampler = {self.sampler}", why="there is no such sampler", fix=f"use one of {', '.join(SAMPLERS)}")

    def _pairs(self) -> Iterator[Problem]:
        if self.strength < 1 and self.image is None:
            yield Problem("strength without a starting picture", fix="give an image, or leave strength out")
        if self.negative and self.cfg == 1:
            yield Problem("a negative prompt has no effect while cfg is 1", fix="set cfg = 3.5, or leave the negative prompt out")
        tiling = self.tiling()
        if tiling and (tiling.overlap < 0 or tiling.tile - tiling.overlap < MULTIPLE):
            what = f"tile = {tiling.tile}, overlap = {tiling.overlap}"
            yield Problem(what, why=f"tiles must advance by {MULTIPLE} pixels", fix="use a tile of 1024; its overlap follows")
        yield from self._window_problems()

    def _window_problems(self) -> Iterator[Problem]:
        windows = self.windows()
        if windows is None:
            if self.denoise_overlap is not None:
                yield Problem("denoise_overlap without denoise_tile", fix="set denoise_tile = 1024, or leave both out")
            return
        if windows.overlap < 0 or windows.tile - windows.overlap < MULTIPLE:
            what = f"denoise_tile = {windows.tile}, denoise_overlap = {windows.overlap}"
            yield Problem(what, why=f"windows must advance by {MULTIPLE} pixels", fix="use 1024; the overlap follows")
        if self.cache is not None:
            yield Problem(
                "a step cache with denoise_tile", why="it compares one forward with the next, and tiles alternate", fix="drop one"
            )

    def settings(self) -> dict[str, Any]:
        """JSON-ready settings, pictures left out."""
        values = asdict(replace(self, image=None, control_image=None, controls={}, noise=None))
        for name in ("image", "control_image", "controls", "noise", *(() if self.sigmas else ("sigmas",))):
            del values[name]
        given = {name: {key: plain(value) for key, value in options.items()} for name, options in self.controls.items()}
        return {**values, "image_to_image": self.image is not None, **({"controls": given} if given else {})}


def plain(value: Any) -> Any:
    """An option of a control as JSON has it; a picture is told by its size."""
    if isinstance(value, Image.Image):
        return f"picture of {value.width} x {value.height}"
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)


def _is_schedule(levels: tuple[float, ...]) -> bool:
    falls = all(now > after for now, after in itertools.pairwise(levels))
    return len(levels) > 1 and levels[0] <= 1 and levels[-1] == 0 and falls


def _is_shift(value: object) -> bool:
    if isinstance(value, int | float):
        return value > 0 and math.isfinite(value)
    return value in (None, "flux", "none")


@dataclass(frozen=True)
class Picture:
    """A finished picture and what made it."""

    image: Image.Image
    request: Request
    seconds: float
    notes: Mapping[str, Any] = field(default_factory=dict)  # what drawing it found, such as how many forwards a step cache left out

    @property
    def settings(self) -> dict[str, Any]:
        """What is written into the PNG."""
        return {**self.request.settings(), **self.notes}
