"""Flex.2: a picture to repaint and a control picture in one model. `[[control]] type = "flex2" control_image = "depth.png"`.

For Flex.2-preview, whose tokens have 196 features, of 49 channels: noise 16, picture to repaint 16, its mask 1, control picture 16.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field
from torch import Tensor

from fluxsmith.config.control import ControlConfig, Ground, Picture
from fluxsmith.controls.base import Control as Base
from fluxsmith.controls.base import Prepared, Scene, Site, Unchanged, both
from fluxsmith.controls.image_rows import part, with_features
from fluxsmith.controls.pictures import cover, opened, shapes_differ, size_of, unreadable
from fluxsmith.controls.pictures import pixels as to_pixels
from fluxsmith.errors import Problem
from fluxsmith.models.stream import Tokens, Window

CELL = 8  # pixels of a latent cell's side
LATENTS = 16


class Config(ControlConfig):
    """What is repainted, and what guides it; both may be left out."""

    image: Picture | None = None
    """The picture to repaint; without it everything is new."""
    mask: Picture | None = None
    """White where it is repainted, black where it is kept, grey in between; without it everything is repainted."""
    control_image: Picture | None = None
    """A control picture: edges, depth, a pose, ... as they are."""
    strength: float = 0.5
    """Factor on the control picture's latents."""
    stop: Annotated[float, Field(ge=0, le=1)] = 0.5
    """When the control picture stops to act, as a part of the steps; 0 still covers the first."""

    def natural_size(self, side: int) -> tuple[int, int] | None:
        """That of the picture to repaint, else of the control picture."""
        picture = self.control_image if self.image is None else self.image
        return None if picture is None else size_of(picture)

    def problems(self, ground: Ground) -> Iterator[Problem]:
        """Image and mask go together."""
        found = [*unreadable((self.image, self.mask, self.control_image))]
        yield from found
        if self.mask is not None and self.image is None:
            yield Problem("flex2 has a mask but no image", fix="give it an image, or leave the mask out")
        if not found and self.mask is not None and self.image is not None:
            yield from shapes_differ("mask", self.mask, "image", self.image)

    def build(self, site: Site) -> "Control":
        """Nothing to load."""
        return Control(self)


class Control(Base):
    """What Flex.2 sees."""

    role = "flex2"
    loads = ()

    def prepare(self, scene: Scene) -> Prepared:
        """Encodes the pictures, cropped at their centre to the size of the picture."""
        config, cells = self.config, (scene.width // CELL, scene.height // CELL)

        def encoded(picture: object) -> Tensor:
            if picture is None:
                return torch.zeros(1, LATENTS, cells[1], cells[0], device=scene.device)
            return scene.encode(to_pixels(cover(opened(picture), scene.width, scene.height)))

        mask = torch.ones(1, 1, cells[1], cells[0]) if config.mask is None else repaint(cover_to(config.mask, cells))
        image, control = encoded(config.image), encoded(config.control_image)
        return both(Flex.of(image, mask.to(image), control * config.strength, last_level(scene.levels, config.stop)))


class Flex(Unchanged):
    """The condition (1 or B, 33, h, w), packed beside the noise; the control part is zero below a noise level."""

    def __init__(self, condition: Tensor, last: float) -> None:
        self.condition = condition
        self.last = last

    @classmethod
    def of(cls, image: Tensor, mask: Tensor, control: Tensor, last: float) -> "Flex":
        """Latents of the picture and of the control picture (1, 16, h, w), mask (1, 1, h, w) in 0..1."""
        return cls(torch.cat((image * (1 - mask), mask, control), dim=1), last)

    def tokens(self, tokens: Tokens) -> Tokens:
        """As Conditioner.tokens."""
        return with_features(tokens, self.condition)

    def at(self, sigma: float) -> "Flex":
        """The same without the control picture where it has stopped to act."""
        if sigma >= self.last:
            return self
        seen = self.condition[:, : LATENTS + 1]
        return Flex(torch.cat((seen, torch.zeros_like(self.condition[:, LATENTS + 1 :])), dim=1), self.last)

    def tile(self, window: Window) -> "Flex":
        """The window's part."""
        return Flex(part(self.condition, window), self.last)


def cover_to(picture: object, cells: tuple[int, int]) -> Image.Image:
    """A mask cropped at its centre to the shape of the latents, and scaled to their size with Pillow's default filter."""
    return ImageOps.fit(opened(picture), cells, Image.Resampling.BICUBIC)


def repaint(mask: Image.Image) -> Tensor:
    """A mask of the latents' size -> (1, 1, h, w) in 0..1, its first channel."""
    return torch.from_numpy(np.array(mask)[..., 0].astype(np.float32) / 255)[None, None]


def last_level(levels: Sequence[float], stop: float) -> float:
    """The lowest noise level at which the control picture acts; `levels` end with 0, which is no step."""
    return levels[int(stop * (len(levels) - 2))]
