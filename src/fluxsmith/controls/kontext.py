"""Kontext: pictures that the prompt talks about, seen as they are. `[[control]] type = "kontext" images = ["cat.png", "hat.png"]`.

Their latents follow the denoised tokens; the first position axis tells them apart from the picture (Labs et al. 2025). It belongs to
FLUX.1-Kontext, which has no weights of its own beside the transformer.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from fluxsmith.config.control import ControlConfig, Ground, Pictures
from fluxsmith.controls.base import APPENDED, Prepared, Scene, Site, Unchanged, both
from fluxsmith.controls.base import Control as Base
from fluxsmith.controls.image_rows import with_image
from fluxsmith.controls.pictures import at_most, opened, size_of, to_multiple, unreadable
from fluxsmith.controls.pictures import pixels as to_pixels
from fluxsmith.errors import Problem
from fluxsmith.models.packing import image_ids, pack
from fluxsmith.models.stream import Tokens

FEATURES = 64
TOKEN = 256  # pixels


class Config(ControlConfig):
    """One or several reference pictures."""

    images: Pictures = ()
    """The pictures; each keeps its size, cropped a little so that its sides are multiples of 16."""
    max_pixels: PositiveInt | None = None
    """Larger pictures are scaled down to this many pixels; by default none is."""
    placement: Literal["overlap", "index", "offset"] = "overlap"
    """Positions of several: overlap, all in one place as Kontext was made (they blend); index, each on a step of its own of the first
    axis; offset, side by side."""

    def natural_size(self, side: int) -> tuple[int, int] | None:
        """The shape of the first reference, at the model's usual number of pixels."""
        if not self.images:
            return None
        width, height = size_of(self.images[0])
        factor = side / math.sqrt(width * height)
        return round(width * factor), round(height * factor)

    def misfits(self, ground: Ground) -> Iterator[Problem]:
        """Reference tokens have the features of plain latents."""
        if ground.in_channels != FEATURES:
            why = f"this transformer takes {ground.in_channels} features a token, a reference has {FEATURES}"
            yield Problem("kontext does not go with this transformer", why=why, fix="use FLUX.1-Kontext-dev, or remove the control")

    def problems(self, ground: Ground) -> Iterator[Problem]:
        """Pictures are needed, and they must be there."""
        if not self.images:
            yield Problem(f"control {self.name or self.type} has no picture", fix="give it images")
        yield from unreadable(self.images)

    def build(self, site: Site) -> "Control":
        """Nothing to load."""
        return Control(self)


class Control(Base):
    """Reference pictures."""

    role = "kontext"
    loads = ()

    @property
    def added_tokens(self) -> int:
        """As Control.added_tokens."""
        areas = [width * height for width, height in map(size_of, self.config.images)]
        return sum(min(area, self.config.max_pixels or area) // TOKEN for area in areas)

    def prepare(self, scene: Scene) -> Prepared:
        """Encodes every picture."""
        sized = [to_multiple(at_most(opened(picture), self.config.max_pixels)) for picture in self.config.images]
        return both(Kontext.of([scene.encode(to_pixels(image)) for image in sized], self.config.placement))


class Kontext(Unchanged):
    """Reference tokens (1 or B, S, 64) with their ids (1, S, 3): the Conditioner of one picture or batch."""

    order = APPENDED

    def __init__(self, rows: Tensor, ids: Tensor) -> None:
        self.rows = rows
        self.ids = ids

    @classmethod
    def of(cls, latents: Sequence[Tensor], placement: str = "overlap") -> "Kontext":
        """For references' latents (1 or B, 16, h, w), each of its own size."""
        ids = positions([(one.shape[-2], one.shape[-1]) for one in latents], placement)
        rows = torch.cat([pack(one) for one in latents], dim=1)
        return cls(rows, ids.to(rows.device))

    def tokens(self, tokens: Tokens) -> Tokens:
        """As Conditioner.tokens; their part of the prediction is cut off by `n_target`."""
        return with_image(tokens, self.rows, self.ids)


def positions(sizes: Sequence[tuple[int, int]], placement: str) -> Tensor:
    """Ids (1, S, 3) of references of these latent sizes, in order."""
    made, bottom, right = [], 0, 0
    for number, (height, width) in enumerate(sizes):
        ids = image_ids(1, height, width, axis=number + 1 if placement == "index" else 1)
        if placement == "offset":  # beside or below the others, where the whole stays closer to a square
            down = height + bottom <= width + right
            ids = ids + torch.tensor([0.0, bottom // 2 if down else 0, 0 if down else right // 2])
            bottom, right = max(bottom, height + bottom * down), max(right, width + right * (not down))
        made.append(ids)
    return torch.cat(made, dim=1)
