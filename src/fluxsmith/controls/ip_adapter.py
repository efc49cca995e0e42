"""IP-Adapter: pictures as a second prompt. `[[control]] type = "ip_adapter" path = ... encoder = ... images = ["cat.png"]`.

The file tells whose it is: InstantX' looks with SigLIP and acts in every block, XLabs' looks with CLIP and acts in the double blocks.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fluxsmith.config.control import ControlConfig, Ground, Pictures
from fluxsmith.controls.base import Control as Base
from fluxsmith.controls.base import Prepared, Scene, Site, Unchanged
from fluxsmith.controls.ip_adapter_model import IpAdapter, KeyValue, load_ip_adapter
from fluxsmith.controls.pictures import opened, unreadable
from fluxsmith.controls.span import ALWAYS, Span
from fluxsmith.errors import ModelFileError, Problem
from fluxsmith.io.identify import require_role
from fluxsmith.io.sources import resolve
from fluxsmith.models.flux import FluxDiT, FluxParams
from fluxsmith.models.stream import BlockHook, Conditioner, IpTokens, Stream, Tokens
from fluxsmith.models.vision_encoders import ClipVision, SiglipVision, clip_pixels, load_clip_vision, load_siglip, siglip_pixels

ENCODERS = {"instantx": "google/siglip-so400m-patch14-384", "xlabs": "openai/clip-vit-large-patch14"}


class Config(ControlConfig):
    """One IP-Adapter and the pictures it looks at."""

    path: str = ""
    """The adapter's file (InstantX or XLabs)."""
    encoder: str = ""
    """The image encoder's file: google/siglip-so400m-patch14-384 for InstantX, openai/clip-vit-large-patch14 for XLabs."""
    images: Pictures = ()
    """The pictures; their tokens follow one another."""
    scale: float = 1.0
    """Factor on what the pictures add."""
    start: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Acts from this part of the steps on (0 is the first step)."""
    end: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Acts up to this part of the steps (1 is the last step)."""
    negative: Literal["zero", "none"] = "zero"
    """In the negative branch of guidance: tokens of an empty (zero) image vector at full scale, or nothing."""

    def misfits(self, ground: Ground) -> Iterator[Problem]:
        """Both files are needed, and the first must be an IP-Adapter."""
        name = f"control {self.name or self.type}"
        if not self.path:
            yield Problem(f"{name} has no path", fix="give the file of an IP-Adapter")
        try:
            kind = require_role(resolve(self.path, "ip_adapter"), "ip_adapter").variant if self.path else ""
        except ModelFileError as error:
            yield from error.problems
            return
        if not self.encoder:
            wanted = ENCODERS.get(kind, "its image encoder")
            yield Problem(f"{name} has no encoder", why="nothing looks at the pictures", fix=f"set encoder to the file of {wanted}")

    def problems(self, ground: Ground) -> Iterator[Problem]:
        """Pictures are needed, and they must be there."""
        name = f"control {self.name or self.type}"
        if not self.images:
            yield Problem(f"{name} has no picture", fix="give it images")
        yield from unreadable(self.images)
        if self.start > self.end:
            yield Problem(f"{name} starts at {self.start} and ends at {self.end}", fix="start before the end, such as 0 and 0.6")

    def build(self, site: Site) -> "Control":
        """Both networks on the transformer's device. Raises ModelFileError if they do not fit each other or the model."""
        file, looks = resolve(self.path, "ip_adapter"), resolve(self.encoder, "image_encoder")
        where = {"device": site.device, "dtype": site.dtype}
        net = site.once(("ip_adapter", file), lambda: load_ip_adapter(file, **where))
        check_blocks(net, site.dit, str(file))
        encoder: SiglipVision | ClipVision
        if net.params.kind == "instantx":
            encoder = site.once(("siglip", looks), lambda: load_siglip(looks, **where))
        else:
            encoder = site.once(("clip_vision", looks), lambda: load_clip_vision(looks, **where))
        if width_of(encoder) != net.params.embed:
            why = f"its vectors have {width_of(encoder)} numbers, the adapter takes {net.params.embed}"
            fix = f"use {ENCODERS[net.params.kind]}"
            raise ModelFileError("this image encoder is another than the IP-Adapter looks with", where=str(looks), why=why, fix=fix)
        return Control(net, encoder, site.dit.params, self)


def width_of(encoder: SiglipVision | ClipVision) -> int:
    """Numbers in the vector that an encoder makes of a picture."""
    return encoder.params.hidden if isinstance(encoder, SiglipVision) else encoder.params.projection


def check_blocks(net: IpAdapter, dit: FluxDiT, where: str) -> None:
    """Raise ModelFileError if the adapter is for a transformer of other blocks."""
    p = dit.params
    blocks = p.depth + (p.depth_single_blocks if net.params.kind == "instantx" else 0)
    if (net.params.layers, net.params.hidden) != (blocks, p.hidden_size):
        why = f"it is for {net.params.layers} blocks {net.params.hidden} wide, the model has {blocks} of {p.hidden_size}"
        raise ModelFileError("the IP-Adapter is for another model", where=where, why=why, fix="use an IP-Adapter of this model")


class Control(Base):
    """A loaded IP-Adapter with its image encoder. Neither works while the picture is drawn."""

    role = "ip_adapter"
    loads = ("path", "encoder")

    def __init__(self, net: IpAdapter, encoder: SiglipVision | ClipVision, base: FluxParams, config: Config) -> None:
        super().__init__(config, (encoder, net), denoising=())
        self.net = net
        self.encoder = encoder
        self.base = base

    def prepare(self, scene: Scene) -> Prepared:
        """Looks at every picture; keys and values of all blocks are computed here, once."""
        scene.work(self.encoder, self.net)
        config, span = self.config, Span(scene.levels, self.config.start, self.config.end)
        seen = torch.cat([self.look(picture) for picture in config.images])
        positive = self.conditioner_of(seen, config.scale, span)
        if scene.negative is None or config.negative == "none":
            return Prepared(positive, Unchanged())
        return Prepared(positive, self.conditioner_of(torch.zeros_like(seen[:1]), 1.0, span))

    def look(self, picture: object) -> Tensor:
        """A picture's vector (1, E)."""
        weight = self.net.norm.weight
        image, size = opened(picture), self.encoder.params.image_size
        if isinstance(self.encoder, SiglipVision):
            return self.encoder(siglip_pixels(image, size).to(weight.device)).pooled.to(weight.dtype)
        return self.encoder(clip_pixels(image, size).to(weight.device)).to(weight.dtype)

    def conditioner_of(self, embeds: Tensor, scale: float, span: Span = ALWAYS) -> "Attended":
        """For image vectors (P, E), or (B, P, E) of a batch."""
        rows = self.net.keys_values(self.net.tokens(embeds), self.base.num_heads)
        return Attended(rows, scale, after_block=self.net.params.kind == "xlabs", span=span)


class Attended(Unchanged):
    """Keys and values for the first blocks of the transformer: the Conditioner of one picture or batch."""

    def __init__(self, rows: Sequence[KeyValue], scale: float, *, after_block: bool, span: Span = ALWAYS) -> None:
        self.rows = rows
        self.scale = scale
        self.after_block = after_block
        self.span = span

    def hooks(self, tokens: Tokens) -> Sequence[BlockHook]:
        """As Conditioner.hooks."""
        b, _, _ = tokens.img.shape
        scale = torch.full((), self.scale, device=tokens.img.device)  # a tensor, so that another scale compiles nothing anew
        like = tokens.img
        return [
            AttendHook(
                [
                    IpTokens(row.key.to(like).expand(b, -1, -1, -1), row.value.to(like).expand(b, -1, -1, -1), scale, self.after_block)
                    for row in self.rows
                ]
            )
        ]

    def at(self, sigma: float) -> Conditioner | None:
        """None outside its part of the schedule."""
        return self if self.span.covers(sigma) else None


class AttendHook(BlockHook):
    """Gives each block its own extra keys and values, beside those of other hooks, and takes them away after it."""

    def __init__(self, ip: Sequence[IpTokens]) -> None:
        self.ip = ip

    def before(self, index: int, stream: Stream) -> Stream:
        """As BlockHook.before."""
        return stream._replace(ip=(*stream.ip, self.ip[index])) if index < len(self.ip) else stream

    def after(self, index: int, stream: Stream) -> Stream:
        """As BlockHook.after; hooks are left in the reverse order."""
        return stream._replace(ip=stream.ip[:-1]) if index < len(self.ip) else stream
