"""InfiniteYou: a person kept from a portrait. `[[control]] type = "infiniteyou" path = ... projector = ... face = "me.png"`.

InfuseNet is a ControlNet that reads the person in place of the prompt; it also follows a control picture, or a black one without.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
from PIL import Image
from pydantic import Field, PositiveInt
from torch import Tensor

from fluxsmith.config.control import ControlConfig, Ground, Picture
from fluxsmith.controls.base import Prepared, Scene, Site, both
from fluxsmith.controls.controlnet import Control as ControlNetControl
from fluxsmith.controls.controlnet import Residual, load_shared
from fluxsmith.controls.controlnet_model import ControlNet
from fluxsmith.controls.face_embedding import read_embedding
from fluxsmith.controls.faces import PIP, face_vector, missing_packages
from fluxsmith.controls.infiniteyou_model import FaceProjector, load_face_projector
from fluxsmith.controls.pictures import cover, opened, unreadable
from fluxsmith.controls.pictures import pixels as to_pixels
from fluxsmith.controls.span import Span
from fluxsmith.errors import ConfigError, FluxsmithError, ModelFileError, Problem
from fluxsmith.io.identify import require_role
from fluxsmith.io.sources import resolve
from fluxsmith.models.assembly import Models
from fluxsmith.models.flux import FluxParams
from fluxsmith.models.stream import Tokens


class Config(ControlConfig):
    """InfuseNet, its projector, and the person."""

    path: str = ""
    """InfuseNet: a file, its first shard, or a folder."""
    projector: str = ""
    """The face projector that belongs to it (`image_proj_model.bin`, or the same as safetensors)."""
    face: Picture | None = None
    """A portrait; its largest face is the person. Needs insightface and facexlib."""
    embedding: Path | tuple[float, ...] = ()
    """The face's vector instead of a portrait: the numbers, or a file of them (.json, or .safetensors with one tensor)."""
    face_models: str = "models/ByteDance/InfiniteYou/supports/insightface"
    """Folder with insightface's `models/antelopev2`."""
    image: Picture | None = None
    """Control picture (such as the five points of a face); by default a black one."""
    guidance: float = 1.0
    """Guidance that InfuseNet itself reads; the transformer keeps its own."""
    scale: float = 1.0
    """Factor on all residuals."""
    start: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Acts from this part of the steps on (0 is the first step)."""
    end: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Acts up to this part of the steps (1 is the last step)."""
    heads: PositiveInt | None = None
    """Of the projector; by default one for 64 channels."""

    def mode_number(self) -> None:
        """InfuseNet has one kind of condition."""
        return

    def misfits(self, ground: Ground) -> Iterator[Problem]:
        """Both files are needed, each in its role."""
        name = f"control {self.name or self.type}"
        if ground.family == "chroma":
            yield Problem(f"{name} does not go with Chroma", why="it needs CLIP's vector", fix="use a FLUX.1 model")
        wanted = {
            "path": (self.path, "controlnet", "InfuseNet (InfuseNetModel of ByteDance/InfiniteYou)"),
            "projector": (self.projector, "face_projector", "the face projector (image_proj_model.bin) that lies beside InfuseNetModel"),
        }
        for key, (file, role, title) in wanted.items():
            if not file:
                yield Problem(f"{name} has no {key}", why="the person would have no effect", fix=f"set {key} to {title}")
                continue
            try:
                require_role(resolve(file, role), role)
            except ModelFileError as error:
                yield from error.problems

    def problems(self, ground: Ground) -> Iterator[Problem]:
        """A portrait that can be looked at is needed, or its vector."""
        name = f"control {self.name or self.type}"
        if self.start > self.end:
            yield Problem(f"{name} starts at {self.start} and ends at {self.end}", fix="start before the end, such as 0 and 0.6")
        yield from unreadable((self.face, self.image))
        if self.embedding:
            if self.face is not None:
                yield Problem(f"{name} has a face and an embedding", fix="give one of them")
            try:
                read_embedding(self.embedding)
            except FluxsmithError as error:
                yield from error.problems
            return
        if self.face is None:
            yield Problem(f"{name} has no face", fix="give it a portrait as face, or the face's vector as embedding")
        elif missing_packages():
            yield Problem(f"{name}: looking at a face needs {', '.join(missing_packages())}", fix=PIP)

    def build(self, site: Site) -> "Control":
        """Both networks on the transformer's device. Raises ConfigError or ModelFileError if they do not fit."""
        net, file = load_shared(site, self.path), resolve(self.projector, "face_projector")
        projector = site.once(
            ("face_projector", file, self.heads),
            lambda: load_face_projector(file, device=site.device, dtype=site.dtype, num_heads=self.heads),
        )
        if projector.params.text != net.params.context_in_dim:
            why = f"its tokens are {projector.params.text} wide, InfuseNet reads {net.params.context_in_dim}"
            raise ModelFileError("the face projector is for another InfuseNet", where=str(file), why=why, fix="use the one beside it")
        return Control(net, projector, site.dit.params, self)


class Control(ControlNetControl):
    """InfuseNet with its projector; the projector does not work while the picture is drawn."""

    role = "infiniteyou"
    loads = ("path", "projector", "heads")

    def __init__(self, net: ControlNet, projector: FaceProjector, base: FluxParams, config: Config) -> None:
        super().__init__(net, base, config)
        self.nets = (net, projector)
        self.projector = projector

    def prepare(self, scene: Scene) -> Prepared:
        """Looks at the person, and encodes the control picture."""
        config = self.config
        scene.work()  # what looks at faces is on the device alone
        vector = self.vector(scene.device)
        scene.work(self.projector)
        rows = self.identity(vector)
        size = (scene.width, scene.height)
        shown = Image.new("RGB", size) if config.image is None else cover(opened(config.image), *size)
        return both(Person(self, scene.encode(to_pixels(shown)), rows, Span(scene.levels, config.start, config.end)))

    def vector(self, device: torch.device) -> Tensor:
        """The person's vector (E,). Raises ConfigError or DataError."""
        config = self.config
        if config.embedding:
            return read_embedding(config.embedding)
        return face_vector(opened(config.face), folder=config.face_models, device=device)

    def identity(self, vector: Tensor) -> Tensor:
        """A face's vector (E,) -> tokens (1, Q, D_txt). Raises ConfigError for a vector of another length."""
        if vector.numel() != self.projector.params.face:
            why = f"it has {vector.numel()} numbers, the projector takes {self.projector.params.face}"
            raise ConfigError("the face vector does not fit", why=why, fix="make it with ArcFace as InfiniteYou does")
        return self.projector(vector.to(self.projector.latents).view(1, -1))

    def conditioner(self, models: Models, pixels: Tensor | None) -> "Person":
        """Not yet."""
        raise ConfigError("infiniteyou cannot be used in training yet", fix="train without this [[control]]")


class Person(Residual):
    """InfuseNet's condition with the person's tokens (1, Q, D_txt): the Conditioner of one picture."""

    def __init__(self, control: Control, condition: Tensor, rows: Tensor, span: Span) -> None:
        super().__init__(control, condition, span)
        self.rows = rows

    def own(self, tokens: Tokens) -> Tokens:
        """The person in place of the text, with InfuseNet's own guidance; the pooled text stays."""
        b, length = tokens.img.shape[0], self.rows.shape[1]
        ids = tokens.txt_ids.new_zeros(b, length, tokens.txt_ids.shape[-1])
        guidance = torch.full_like(tokens.t, self.control.config.guidance)
        rows = self.rows.to(tokens.txt).expand(b, -1, -1)
        return tokens._replace(txt=rows, txt_ids=ids, guidance=guidance, mask=None, n_prompt=0)

    def on(self, condition: Tensor) -> "Person":
        """The same with another condition."""
        if not isinstance(self.control, Control):
            raise TypeError("a Person belongs to InfiniteYou")
        return Person(self.control, condition, self.rows, self.span)
