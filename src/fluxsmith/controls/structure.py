"""Structure: a picture drawn over the edges or the depth of another. `[[control]] type = "structure" image = "edges.png"`.

For FLUX.1-Canny-dev and FLUX.1-Depth-dev (128 features a token: noise 64, control picture 64), and for FLUX.1-dev with their LoRA.
"""

from collections.abc import Iterator

from torch import Tensor

from fluxsmith.config.control import ControlConfig, Ground, Picture
from fluxsmith.controls.base import Control as Base
from fluxsmith.controls.base import Prepared, Scene, Site, Unchanged, both
from fluxsmith.controls.image_rows import part, with_features
from fluxsmith.controls.pictures import cover, opened, unreadable
from fluxsmith.controls.pictures import pixels as to_pixels
from fluxsmith.errors import Problem
from fluxsmith.models.stream import Tokens, Window


class Config(ControlConfig):
    """The control picture."""

    image: Picture | None = None
    """Edges or depth, scaled and cropped at its centre to the size of the picture that is drawn."""

    def problems(self, ground: Ground) -> Iterator[Problem]:
        """A control picture is needed."""
        if self.image is None:
            yield Problem(f"control {self.name or self.type} has no picture", fix="give it an image: edges for Canny, depth for Depth")
        yield from unreadable((self.image,))

    def build(self, site: Site) -> "Control":
        """Nothing to load."""
        return Control(self)


class Control(Base):
    """What the model is to follow."""

    role = "structure"
    loads = ()

    def prepare(self, scene: Scene) -> Prepared:
        """Encodes the control picture."""
        return both(Structure(scene.encode(to_pixels(cover(opened(self.config.image), scene.width, scene.height)))))


class Structure(Unchanged):
    """Latents of the control picture (1 or B, 16, h, w), packed beside the noise: the Conditioner of one picture or batch."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents

    def tokens(self, tokens: Tokens) -> Tokens:
        """As Conditioner.tokens."""
        return with_features(tokens, self.latents)

    def tile(self, window: Window) -> "Structure":
        """The window's part."""
        return Structure(part(self.latents, window))
