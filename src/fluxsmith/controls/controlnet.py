"""ControlNet beside the transformer: `[[control]] type = "controlnet" path = "union.safetensors" image = "edges.png" mode = "canny"`.

Without a path (and with `train = true`) the network starts as a copy of the base's first blocks, so that training begins with what the
base knows. Several sections with one file share its weights.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from fluxsmith.config.control import ControlConfig, Ground, Picture
from fluxsmith.controls.base import Control as Base
from fluxsmith.controls.base import Prepared, ResidualHook, Scene, Site, Unchanged, both
from fluxsmith.controls.controlnet_condition import condition_of, network_problems, picture_problems
from fluxsmith.controls.controlnet_model import ControlNet, Residuals, from_base, load_controlnet
from fluxsmith.controls.span import ALWAYS, Span
from fluxsmith.errors import ConfigError, DataError, Problem
from fluxsmith.io.sources import resolve
from fluxsmith.models.assembly import Models
from fluxsmith.models.flux import FluxDiT, FluxParams
from fluxsmith.models.packing import pack
from fluxsmith.models.stream import BlockHook, Conditioner, Tokens, Window

MODES = {"canny": 0, "tile": 1, "depth": 2, "blur": 3, "pose": 4, "gray": 5, "low_quality": 6}  # of InstantX' and Shakker Labs' union files
MODE_ALIASES = {"openpose": "pose", "lq": "low_quality", "grey": "gray"}


class Config(ControlConfig):
    """One ControlNet."""

    path: str = ""
    """File of a trained one (InstantX, diffusers, XLabs, sd-scripts); empty: a new one, made from the base."""
    image: Picture | None = None
    """Condition picture, scaled and cropped at its centre to the size of the picture that is drawn."""
    processor: Literal[
        "none", "canny", "tile", "blur", "gray", "low_quality", "inpaint",
        "depth", "softedge", "lineart", "lineart_anime", "openpose", "pose", "normal",
    ] = "none"  # fmt: skip
    """Makes the condition picture from `image`; the second row is learned and needs controlnet_aux."""
    thresholds: tuple[NonNegativeInt, NonNegativeInt] = (100, 200)
    """Of the processor canny: edges grow from above the second down to the first."""
    annotators: str = "lllyasviel/Annotators"
    """Folder, or id at Hugging Face, with the weights of learned processors."""
    mode: NonNegativeInt | Literal["canny", "tile", "depth", "blur", "pose", "openpose", "gray", "grey", "low_quality", "lq"] | None = None
    """Kind of condition, for union networks; by default that of the processor."""
    mask: Picture | None = None
    """For inpainting networks: white where `image` is drawn anew, black where it is kept."""
    scale: float = 1.0
    """Factor on all residuals."""
    start: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Acts from this part of the steps on (0 is the first step)."""
    end: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Acts up to this part of the steps (1 is the last step)."""
    train: bool = False
    """Train it; the base stays as it is."""
    layout: Literal["latents", "pixels"] = "latents"
    """Of a new one: latents of the condition picture (InstantX, diffusers), or its pixels (XLabs, sd-scripts)."""
    double_blocks: PositiveInt = 2
    """Double blocks of a new one."""
    single_blocks: NonNegativeInt = 0
    """Single blocks of a new one (latents layout)."""

    def mode_number(self) -> int | None:
        """The number of the kind of condition; None if neither mode nor processor tells."""
        if isinstance(self.mode, int):
            return self.mode
        name = self.mode or self.processor
        return MODES.get(MODE_ALIASES.get(name, name))

    def misfits(self, ground: Ground) -> Iterator[Problem]:
        """ControlNets read CLIP's vector, and the file must be one."""
        if ground.family == "chroma":
            yield Problem(
                f"control {self.name or self.type} does not go with Chroma", why="it needs CLIP's vector", fix="use a FLUX.1 model"
            )
        yield from network_problems(self)

    def problems(self, ground: Ground) -> Iterator[Problem]:
        """A condition picture is needed, a mask where the network takes one, a mode where it has several."""
        yield from picture_problems(self)

    def build(self, site: Site) -> "Control":
        """The network on the transformer's device. Raises ConfigError or ModelFileError if it does not fit."""
        dit = site.dit
        if self.path:
            net = load_shared(site, self.path)
        else:
            generator = torch.Generator().manual_seed(site.seed)
            net = from_base(
                dit, layout=self.layout, double_blocks=self.double_blocks, single_blocks=self.single_blocks, generator=generator
            ).to(site.dtype)
        return Control(net.eval(), dit.params, self)


def load_shared(site: Site, path: str) -> ControlNet:
    """The ControlNet of a file, loaded once for all that use it. Raises ConfigError if it belongs to another transformer."""
    file, axes = resolve(path, "controlnet"), site.dit.params.axes_dim
    net = site.once(("controlnet", file), lambda: load_controlnet(file, device=site.device, dtype=site.dtype, axes_dim=axes))
    _check_fit(net, site.dit, str(file))
    return net


def _check_fit(net: ControlNet, dit: FluxDiT, where: str) -> None:
    for what, name in (("channels", "hidden_size"), ("text features", "context_in_dim"), ("pooled features", "vec_in_dim")):
        ours, theirs = getattr(dit.params, name), getattr(net.params, name)
        if ours != theirs:
            raise ConfigError(f"{where}: made for {theirs} {what}, the model has {ours}", fix="use a ControlNet of this model")


class Control(Base):
    """A loaded ControlNet; `prepare` and `conditioner` make it ready."""

    role = "controlnet"
    loads = ("path", "train", "layout", "double_blocks", "single_blocks")

    def __init__(self, net: ControlNet, base: FluxParams, config: ControlConfig) -> None:
        super().__init__(config, (net,))
        self.net = net
        self.base = base

    def prepare(self, scene: Scene) -> Prepared:
        """Makes and encodes the condition."""
        config = self.config
        return both(Residual(self, condition_of(config, self.net, scene), Span(scene.levels, config.start, config.end)))

    def conditioner(self, models: Models, pixels: Tensor | None) -> "Residual":
        """For condition pictures (B, 3, H, W) in [-1, 1]. Raises DataError if there are none."""
        if pixels is None:
            raise DataError("the ControlNet has no condition pictures", fix="set data.condition_dir")
        pixels = pixels.to(next(self.net.parameters()).device)
        if self.net.control.layout == "pixels":
            return Residual(self, pixels)
        if models.ae is None:
            raise ValueError("the autoencoder is not loaded")
        with torch.no_grad():
            return Residual(self, models.ae.encode(pixels.to(next(models.ae.parameters()).dtype)))


class Residual(Unchanged):
    """A ControlNet with its condition, latents (B, C, h, w) or pixels (B, 3, H, W) as its layout wants: the Conditioner of one batch."""

    def __init__(self, control: Control, condition: Tensor, span: Span = ALWAYS) -> None:
        self.control = control
        self.condition = condition
        self.span = span

    def own(self, tokens: Tokens) -> Tokens:
        """What the network reads: the transformer's input; InfiniteYou puts a person in place of the text."""
        return tokens

    def hooks(self, tokens: Tokens) -> Sequence[BlockHook]:
        """Residuals of this forward, computed when the first block asks (a step cache may never ask)."""
        control, base = self.control, self.control.base
        scale = torch.full((), control.config.scale, device=tokens.img.device)  # a tensor, so that another scale compiles nothing anew
        condition = self.condition if control.net.control.layout == "pixels" else pack(self.condition)
        made: list[Residuals] = []

        def residual(index: int) -> Tensor | None:
            if not made:
                made.append(control.net.residuals(self.own(tokens), condition, control.config.mode_number()))
            found = made[0].of(index, base.depth, base.depth_single_blocks)
            return None if found is None else found * scale

        return [ResidualHook(residual)]

    def at(self, sigma: float) -> Conditioner | None:
        """None outside its part of the schedule."""
        return self if self.span.covers(sigma) else None

    def tile(self, window: Window) -> "Residual":
        """The condition's part."""
        factor = self.condition.shape[-2] // window.rows
        rows = slice(window.top * factor, (window.top + window.height) * factor)
        columns = slice(window.left * factor, (window.left + window.width) * factor)
        return self.on(self.condition[..., rows, columns])

    def on(self, condition: Tensor) -> "Residual":
        """The same with another condition."""
        return Residual(self.control, condition, self.span)
