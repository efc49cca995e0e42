"""Redux: variations of pictures, with or without a prompt. `[[control]] type = "redux" path = ... encoder = ... images = ["cat.png"]`.

SigLIP's tokens of each picture, through Redux' embedder, follow the prompt's. As BFL made it the prompt stays and can be weakened by
the pictures (`scale`); without `keep_prompt` it has no effect at all.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fluxsmith.config.control import ControlConfig, Ground, Pictures
from fluxsmith.controls.base import TEXT, Prepared, Scene, Site, Unchanged
from fluxsmith.controls.base import Control as Base
from fluxsmith.controls.pictures import opened, unreadable
from fluxsmith.controls.redux_model import ReduxEmbedder, load_redux
from fluxsmith.controls.text_rows import with_rows
from fluxsmith.errors import ModelFileError, Problem
from fluxsmith.io.sources import resolve
from fluxsmith.models.stream import Tokens
from fluxsmith.models.vision_encoders import SiglipVision, load_siglip, siglip_pixels

REPLACES_PROMPT = ("step1x", "nexus_gen")


class Config(ControlConfig):
    """Redux and the pictures it looks at."""

    path: str = ""
    """The image embedder of FLUX.1-Redux-dev."""
    encoder: str = ""
    """SigLIP so400m (patch 14, 384 pixels), as FLUX.1-Redux-dev carries it."""
    images: Pictures = ()
    """The pictures; their tokens follow one another."""
    scale: float = 1.0
    """Factor on the pictures' tokens; below 1 the prompt counts for more."""
    keep_prompt: bool = True
    """False: no prompt, as DiffSynth-Studio does it; its tokens and the pooled vector become zero."""
    on_negative: bool = False
    """The negative branch of guidance sees the pictures too."""

    def misfits(self, ground: Ground) -> Iterator[Problem]:
        """Both files are needed."""
        for key, what in (("path", "the Redux image embedder"), ("encoder", "SigLIP, which looks at the pictures")):
            if not self.model_dump()[key]:
                yield Problem(f"control {self.name or self.type} has no {key}", fix=f"give the file of {what}")

    def problems(self, ground: Ground) -> Iterator[Problem]:
        """Pictures are needed, and they must be there."""
        if not self.images:
            yield Problem(f"control {self.name or self.type} has no picture", fix="give it images")
        yield from unreadable(self.images)
        replaced = [name for name in REPLACES_PROMPT if name in ground.others]
        if not self.keep_prompt and replaced:
            why = f"both it and {replaced[0]} would take the prompt's place"
            yield Problem("redux without the prompt", why=why, fix="set keep_prompt = true, or remove one of them")

    def build(self, site: Site) -> "Control":
        """Both networks on the transformer's device. Raises ModelFileError if they do not fit each other or the model."""
        file, looks = resolve(self.path, "image_embedder"), resolve(self.encoder, "image_encoder")
        net = site.once(("image_embedder", file), lambda: load_redux(file, device=site.device, dtype=site.dtype))
        siglip = site.once(("siglip", looks), lambda: load_siglip(looks, device=site.device, dtype=site.dtype))
        width, text = net.redux_down.out_features, site.dit.params.context_in_dim
        if width != text:
            why = f"its tokens are {width} wide, the model's text {text}"
            raise ModelFileError("the image embedder is for another model", where=str(file), why=why, fix="use FLUX.1-Redux-dev's")
        if net.redux_up.in_features != siglip.params.hidden:
            why = f"it is {siglip.params.hidden} wide, the image embedder takes {net.redux_up.in_features}"
            raise ModelFileError("this SigLIP is another than Redux looks with", where=str(looks), why=why, fix="use FLUX.1-Redux-dev's")
        return Control(net, siglip, self)


class Control(Base):
    """Redux' embedder and the encoder before it."""

    role = "redux"
    loads = ("path", "encoder")

    def __init__(self, net: ReduxEmbedder, siglip: SiglipVision, config: Config) -> None:
        super().__init__(config, (siglip, net), denoising=())
        self.net = net
        self.siglip = siglip

    @property
    def added_tokens(self) -> int:
        """As Control.added_tokens."""
        params = self.siglip.params
        return (params.image_size // params.patch) ** 2 * len(self.config.images)

    def prepare(self, scene: Scene) -> Prepared:
        """Looks at every picture."""
        scene.work(self.siglip, self.net)
        weight = self.net.redux_up.weight
        side = self.siglip.params.image_size
        seen = [self.siglip(siglip_pixels(opened(picture), side).to(weight.device)) for picture in self.config.images]
        rows = torch.cat([self.net(one.tokens.to(weight.dtype)) for one in seen], dim=1) * self.config.scale
        there = Variation(rows, keep_prompt=self.config.keep_prompt)
        return Prepared(there, there if self.config.on_negative else Unchanged())


class Variation(Unchanged):
    """Pictures' tokens (1 or B, S, D_txt) behind the prompt or instead of it: the Conditioner of one picture or batch."""

    order = TEXT

    def __init__(self, rows: Tensor, *, keep_prompt: bool = True) -> None:
        self.rows = rows
        self.keep_prompt = keep_prompt
        self.order = TEXT if keep_prompt else TEXT - 1  # what others add comes behind, so that it is not silenced with the prompt

    def tokens(self, tokens: Tokens) -> Tokens:
        """As Conditioner.tokens."""
        if not self.keep_prompt:
            tokens = tokens._replace(txt=torch.zeros_like(tokens.txt), y=torch.zeros_like(tokens.y))
        return with_rows(tokens, self.rows)
