"""Value control (AttriCtrl): how bright, as a number. `[[control]] type = "value" path = "brightness.safetensors" value = 0.8`.

One control an attribute; several add their tokens in order. They act in both branches of guidance.
"""

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fluxsmith.config.control import ControlConfig, Ground
from fluxsmith.controls.base import TEXT, Prepared, Scene, Site, Unchanged, both
from fluxsmith.controls.base import Control as Base
from fluxsmith.controls.text_rows import with_rows
from fluxsmith.controls.value_model import ValueEncoder, load_value_encoder
from fluxsmith.errors import ModelFileError, Problem
from fluxsmith.io.sources import resolve
from fluxsmith.models.stream import Tokens


class Config(ControlConfig):
    """One attribute."""

    path: str = ""
    """Its value encoder, such as AttriCtrl-FLUX.1-Dev's models/brightness.safetensors."""
    value: Annotated[float, Field(ge=0, le=1)] | None = None
    """How much of it, 0 to 1."""

    def misfits(self, ground: Ground) -> Iterator[Problem]:
        """Its file is needed."""
        if not self.path:
            yield Problem(f"control {self.name or self.type} has no path", fix="give the file of a value encoder")

    def problems(self, ground: Ground) -> Iterator[Problem]:
        """A value is needed."""
        if self.value is None:
            yield Problem(f"control {self.name or self.type} has no value", fix="give it a value from 0 to 1")

    def build(self, site: Site) -> "Control":
        """The encoder on the transformer's device. Raises ModelFileError if it is for text of another width."""
        file = resolve(self.path, "value_encoder")
        net = site.once(("value_encoder", file), lambda: load_value_encoder(file, device=site.device, dtype=site.dtype))
        width, text = net.positional_embedding.shape[1], site.dit.params.context_in_dim
        if width != text:
            why = f"its tokens are {width} wide, the model's text {text}"
            raise ModelFileError("the value encoder is for another model", where=str(file), why=why, fix="use one made for FLUX.1")
        return Control(net, self)


class Control(Base):
    """One attribute's encoder and its value."""

    role = "value"

    def __init__(self, net: ValueEncoder, config: Config) -> None:
        super().__init__(config, (net,), denoising=())
        self.net = net

    @property
    def added_tokens(self) -> int:
        """As Control.added_tokens."""
        return self.net.positional_embedding.shape[0]

    def prepare(self, scene: Scene) -> Prepared:
        """Makes the tokens."""
        scene.work(self.net)
        device = self.net.positional_embedding.device
        return both(Rows(self.net(torch.tensor([self.config.value], device=device))))


class Rows(Unchanged):
    """Tokens (1 or B, S, D_txt) behind the text: the Conditioner of one picture or batch."""

    order = TEXT

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def tokens(self, tokens: Tokens) -> Tokens:
        """As Conditioner.tokens."""
        return with_rows(tokens, self.rows)
