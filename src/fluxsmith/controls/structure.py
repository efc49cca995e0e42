"""Structure: a picture drawn over the edges or the depth of another. `[[control]] type = "structure" image = "edges.png"`.

For FLUX.1-Canny-dev and FLUX.1-Depth-dev (128 features a token: noise 64, control picture 64), and for FLUX.1-dev with their LoRA.
"""

from collections.abc import Iterator
from typing import Literal

from pydantic import NonNegativeInt
from torch import Tensor

from fluxsmith.config.control import ControlConfig, Ground, Picture
from fluxsmith.controls.base import Control as Base
from fluxsmith.controls.base import Prepared, Scene, Site, Unchanged, both
from fluxsmith.controls.image_rows import part, with_features
from fluxsmith.controls.pictures import cover, opened, size_of, unreadable
from fluxsmith.controls.pictures import pixels as to_pixels
from fluxsmith.controls.processors import is_learned, processed, processor_problems
from fluxsmith.errors import Problem
from fluxsmith.models.stream import Tokens, Window


class Config(ControlConfig):
    """The control picture."""

    image: Picture | None = None
    """Edges or depth, scaled and cropped at its centre to the size of the picture that is drawn."""
    processor: Literal["none", "canny", "depth"] = "none"
    """Makes edges or depth from a photograph given as `image`; depth is learned and needs controlnet_aux."""
    thresholds: tuple[NonNegativeInt, NonNegativeInt] = (100, 200)
    """Of the processor canny: edges grow from above the second down to the first."""
    annotators: str = "lllyasviel/Annotators"
    """Folder, or id at Hugging Face, with the weights of the processor depth."""

    def natural_size(self, side: int) -> tuple[int, int] | None:
        """The picture's own."""
        return None if self.image is None else size_of(self.image)

    def problems(self, ground: Ground) -> Iterator[Problem]:
        """A control picture is needed."""
        if self.image is None:
            yield Problem(f"control {self.name or self.type} has no picture", fix="give it an image: edges for Canny, depth for Depth")
        yield from unreadable((self.image,))
        yield from processor_problems(self.processor)

    def build(self, site: Site) -> "Control":
        """Nothing to load."""
        return Control(self)


class Control(Base):
    """What the model is to follow."""

    role = "structure"
    loads = ()

    def prepare(self, scene: Scene) -> Prepared:
        """Encodes the control picture."""
        config = self.config
        image = cover(opened(config.image), scene.width, scene.height)
        if is_learned(config.processor):
            scene.work()  # the annotator is on the device alone
        image = processed(config.processor, image, thresholds=config.thresholds, weights=config.annotators, device=scene.device)
        return both(Structure(scene.encode(to_pixels(image))))


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
