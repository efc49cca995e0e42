"""EliGen: prompts for parts of the picture. `[[control]] type = "eligen" entities = [{ prompt = "a red hat", mask = "hat.png" }, ...]`.

Every entity has its own text, which only the image tokens of its mask attend to; the prompt is for the whole (Zhang et al. 2025). It is
meant for FLUX.1-dev with the EliGen LoRA, loaded like any LoRA.
"""

from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from fluxsmith.config.control import ControlConfig, Ground, Picture
from fluxsmith.config.section import Section
from fluxsmith.controls.base import REGIONS, Prepared, Scene, Site, Unchanged
from fluxsmith.controls.base import Control as Base
from fluxsmith.controls.image_rows import part
from fluxsmith.controls.pictures import opened, unreadable
from fluxsmith.controls.pictures import pixels as to_pixels
from fluxsmith.errors import Problem
from fluxsmith.models.assembly import TextStates, visible
from fluxsmith.models.packing import PATCH
from fluxsmith.models.stream import Tokens, Window

CELL = 8  # pixels of a latent cell's side
TEXT_TOKENS = 512  # of an entity, at most
Fit = Literal["cover", "stretch"]


class Entity(Section):
    """One part of the picture."""

    prompt: str
    """What is there."""
    mask: Picture
    """White where it is, as a picture over the whole."""


class Config(ControlConfig):
    """The entities."""

    masks_attention: ClassVar[bool] = True

    entities: tuple[Entity, ...] = ()
    """Prompts with masks; the request's prompt is about the whole picture."""
    on_negative: bool = False
    """The negative branch of guidance has the same regions, each with the negative prompt."""
    inpaint: bool = False
    """Outside all masks the starting picture stays as it is."""
    fit: Fit = "cover"
    """How masks of another shape are brought to the size of the picture: cropped at their centre, or stretched."""

    def misfits(self, ground: Ground) -> Iterator[Problem]:
        """Entity prompts need T5, and one control holds them all."""
        if "t5xxl" not in ground.roles:
            yield Problem("eligen needs a model with T5", why="entities have prompts of their own", fix="remove the control")
        if self.type in ground.others:
            yield Problem("there are two eligen controls", why="their regions would not know each other", fix="put all entities into one")

    def problems(self, ground: Ground) -> Iterator[Problem]:
        """Entities are needed, with masks that are there."""
        if not self.entities:
            yield Problem(f"control {self.name or self.type} has no entities", fix='give it entities = [{ prompt = "...", mask = "..." }]')
        yield from unreadable(entity.mask for entity in self.entities)
        if self.inpaint and not ground.has_image:
            yield Problem("eligen.inpaint without a starting picture", fix="give a starting picture (--image)")
        if self.on_negative and ground.cfg == 1:
            yield Problem("eligen.on_negative has no effect while cfg is 1", fix="set cfg = 3, or leave it out")

    def build(self, site: Site) -> "Control":
        """Nothing to load."""
        return Control(self, visible_padding=site.dit.visible_padding)


class Regions(NamedTuple):
    """Where entities are: for text and, cell by cell, for what is kept by inpainting."""

    masks: Tensor  # (n, h, w) bool, latent cells
    foreground: Tensor  # (h, w) bool


class Control(Base):
    """The entities of a picture."""

    role = "eligen"
    loads = ()

    def __init__(self, config: Config, *, visible_padding: int = 0) -> None:
        super().__init__(config)
        self.visible_padding = visible_padding

    @property
    def added_tokens(self) -> int:
        """As Control.added_tokens."""
        return TEXT_TOKENS * len(self.config.entities)

    def prepare(self, scene: Scene) -> Prepared:
        """Encodes the entities' prompts."""
        config = self.config
        regions = regions_of([opened(entity.mask) for entity in config.entities], scene.width, scene.height, fit=config.fit)
        regions = Regions(regions.masks.to(scene.device), regions.foreground.to(scene.device))
        kept = scene.clean if config.inpaint else None
        states = scene.encode_text([entity.prompt for entity in config.entities])
        positive = Entities(*self._texts(states, scene), regions, kept)
        if scene.negative is None:
            return Prepared(positive, positive)
        if not config.on_negative:
            return Prepared(positive, Kept(regions, kept))
        negative, seen = self._texts(scene.encode_text([scene.negative]), scene)
        count = len(config.entities)
        again = Entities(negative.expand(count, -1, -1), None if seen is None else seen.expand(count, -1), regions, kept)
        return Prepared(positive, again)

    def _texts(self, states: TextStates, scene: Scene) -> tuple[Tensor, Tensor | None]:
        """Rows (n, T, D), and which of them may be attended to, (n, T), where padding is hidden."""
        states = states.to(scene.device, scene.dtype)
        return states.txt, visible(states.mask, self.visible_padding) if scene.models.mask_text else None


class Kept(Unchanged):
    """Outside the regions the prediction leads back to the starting picture (latents `clean`), if there is one."""

    order = REGIONS

    def __init__(self, regions: Regions, clean: Tensor | None) -> None:
        self.regions = regions
        self.clean = clean

    def correct(self, v: Tensor, x: Tensor, sigma: float) -> Tensor:
        """As Conditioner.correct; in every branch, so that no guidance scale changes what is kept."""
        return v if self.clean is None else torch.where(self.regions.foreground, v, ((x - self.clean) / sigma).to(v.dtype))


class Entities(Kept):
    """Entities' texts (n, T, D_txt) before the prompt, and who may attend to whom: the Conditioner of one picture."""

    def __init__(self, texts: Tensor, seen: Tensor | None, regions: Regions, clean: Tensor | None = None) -> None:
        """`seen` (n, T): which rows are no padding, where padding is hidden."""
        super().__init__(regions, clean)
        self.texts = texts
        self.seen = seen

    def tokens(self, tokens: Tokens) -> Tokens:
        """As Conditioner.tokens. What others appended, to the text or to the image, is there for the whole picture."""
        b, length = tokens.txt.shape[:2]
        count, each = self.texts.shape[:2]
        rows = self.texts.to(tokens.txt).flatten(0, 1).expand(b, -1, -1)
        allowed = allowed_pairs(token_masks(self.regions.masks), each, length, tokens.img.shape[1])[None, None]
        if tokens.mask is not None:
            own = tokens.mask.new_ones(count * each) if self.seen is None else self.seen.flatten()
            allowed = allowed & torch.cat((own.expand(b, 1, 1, -1), tokens.mask), dim=-1)
        return tokens._replace(
            txt=torch.cat((rows, tokens.txt), dim=1),
            txt_ids=torch.cat((tokens.txt_ids.new_zeros(b, count * each, 3), tokens.txt_ids), dim=1),
            mask=allowed,
            n_prompt=tokens.n_prompt or length,
        )

    def tile(self, window: Window) -> "Entities":
        """The window's part of every mask."""
        cut = Regions(part(self.regions.masks, window), part(self.regions.foreground, window))
        return Entities(self.texts, self.seen, cut)


def regions_of(masks: list[Image.Image], width: int, height: int, *, fit: Fit = "cover") -> Regions:
    """Masks at latent size: nearest for the texts; Pillow's default filter for what is kept, as DiffSynth-Studio has them."""
    size = (width // CELL, height // CELL)

    def bright(mask: Image.Image, filter: Image.Resampling) -> Tensor:
        mask = mask.resize(size, filter) if fit == "stretch" else ImageOps.fit(mask, size, filter)
        return to_pixels(mask)[0].mean(dim=0) > 0

    sharp = torch.stack([bright(mask, Image.Resampling.NEAREST) for mask in masks])
    smooth = torch.stack([bright(mask, Image.Resampling.BICUBIC) for mask in masks])
    return Regions(sharp, smooth.any(dim=0))


def token_masks(masks: Tensor) -> Tensor:
    """(n, h, w) cells -> (n, N) image tokens; one cell of a token is enough."""
    return F.max_pool2d(masks.float(), PATCH).flatten(1) > 0


def allowed_pairs(regions: Tensor, each: int, prompt: int, image: int) -> Tensor:
    """Who may attend to whom, (L, L) bool over [entity texts of `each` rows, prompt, image]; regions (n, N) of the first image tokens.

    A text sees itself and its image tokens, which see it; the prompt is everybody's, image tokens see each other, texts never do.
    """
    count, target = regions.shape
    texts = F.pad(torch.arange(count, device=regions.device).repeat_interleave(each), (0, prompt), value=count)
    places = F.pad(regions, (0, image - target), value=False)
    places = torch.cat((places, places.new_ones(1, image)))[texts]  # of every text row
    return torch.cat(
        (
            torch.cat((texts[:, None] == texts[None], places), dim=1),
            torch.cat((places.T, places.new_ones(image, image)), dim=1),
        )
    )
