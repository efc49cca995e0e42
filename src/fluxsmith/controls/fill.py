"""Fill: the masked part of a picture is drawn anew, the rest is seen. `[[control]] type = "fill" image = "room.png" mask = "sofa.png"`.

For FLUX.1-Fill-dev, whose tokens have 384 features: noise 64, the encoded picture with the mask cut out 64, the mask itself 256.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor

from fluxsmith.config.control import ControlConfig, Ground, Picture
from fluxsmith.controls.base import Control as Base
from fluxsmith.controls.base import Prepared, Scene, Site, Unchanged, both
from fluxsmith.controls.image_rows import part, with_features
from fluxsmith.controls.pictures import alpha_of, cover, grey, opened, shapes_differ, size_of, stretch, unreadable
from fluxsmith.controls.pictures import pixels as to_pixels
from fluxsmith.errors import Problem
from fluxsmith.models.stream import Tokens, Window

CELL = 8  # pixels of a latent cell's side; each becomes a mask channel
LATENTS = 16


class Config(ControlConfig):
    """A picture and where it is to be drawn anew; without both the whole picture is."""

    image: Picture | None = None
    """The picture."""
    mask: Picture | None = None
    """White where it is drawn anew, black where it is kept; by default the transparent part of the image."""
    fit: Literal["cover", "stretch"] = "cover"
    """How image and mask of another shape are brought to the size of the picture: cropped at their centre, or stretched."""

    def natural_size(self, side: int) -> tuple[int, int] | None:
        """The picture's own."""
        return None if self.image is None else size_of(self.image)

    def problems(self, ground: Ground) -> Iterator[Problem]:
        """Image and mask go together."""
        found = [*unreadable((self.image, self.mask))]
        yield from found
        if self.image is None and self.mask is not None:
            yield Problem("fill has a mask but no image", fix="give it an image, or leave the mask out to draw everything")
        if found or self.image is None:
            return
        if self.mask is None and alpha_of(self.image) is None:
            yield Problem("fill has no mask", why="the image has no transparent part either", fix="give it a mask, white where to draw")
        if self.mask is not None:
            yield from shapes_differ("mask", self.mask, "image", self.image)

    def build(self, site: Site) -> "Control":
        """Nothing to load."""
        return Control(self)


class Control(Base):
    """What Fill sees."""

    role = "fill"
    loads = ()

    def prepare(self, scene: Scene) -> Prepared:
        """Encodes the picture without its masked part."""
        config, size = self.config, (scene.width, scene.height)
        if config.image is None:
            return both(Filled(empty(*size).to(scene.device)))
        fit = cover if config.fit == "cover" else stretch
        holes = hole(fit(grey(config.mask), *size) if config.mask is not None else fit(transparent(config.image), *size))
        seen = to_pixels(fit(opened(config.image), *size)) * (1 - holes)
        latents = scene.encode(seen)
        return both(Filled(torch.cat((latents, cells(holes).to(latents)), dim=1)))


class Filled(Unchanged):
    """The condition (1 or B, 80, h, w), packed beside the noise: the Conditioner of one picture or batch."""

    def __init__(self, condition: Tensor) -> None:
        self.condition = condition

    def tokens(self, tokens: Tokens) -> Tokens:
        """As Conditioner.tokens."""
        return with_features(tokens, self.condition)

    def tile(self, window: Window) -> "Filled":
        """The window's part of picture and mask."""
        return Filled(part(self.condition, window))


def transparent(picture: object) -> Image.Image:
    """White where a picture is transparent."""
    alpha = alpha_of(picture)
    if alpha is None:
        raise ValueError("the picture has no transparent part")
    return ImageChops.invert(alpha)


def hole(mask: Image.Image) -> Tensor:
    """A grey mask -> (1, 1, H, W) of 0 and 1; from the middle on it is drawn anew."""
    return to_pixels(mask)[:, :1].ge(0).float()


def cells(holes: Tensor) -> Tensor:
    """A mask (1, 1, H, W) -> (1, 64, H/8, W/8): the pixels of a cell, row by row, are its channels."""
    return F.pixel_unshuffle(holes, CELL)


def empty(width: int, height: int) -> Tensor:
    """The condition (1, 80, h, w) that shows nothing and masks everything."""
    h, w = height // CELL, width // CELL
    return torch.cat((torch.zeros(1, LATENTS, h, w), torch.ones(1, CELL * CELL, h, w)), dim=1)
