"""ControlNet beside the transformer: `[[control]] type = "controlnet" train = true`, or `path = "..."` for one that exists.

Without a path the network starts as a copy of the base's first blocks, so that training begins with what the base knows.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from fluxsmith.config.control import ControlConfig, Ground, Picture
from fluxsmith.controls.base import Control as Base
from fluxsmith.controls.base import Prepared, ResidualHook, Scene, Site, Unchanged, both
from fluxsmith.controls.controlnet_model import ControlNet, Residuals, from_base, load_controlnet
from fluxsmith.controls.pictures import cover, opened
from fluxsmith.controls.pictures import pixels as to_pixels
from fluxsmith.errors import DataError, Problem
from fluxsmith.io.sources import resolve
from fluxsmith.models.assembly import Models
from fluxsmith.models.flux import FluxParams
from fluxsmith.models.packing import pack
from fluxsmith.models.stream import BlockHook, Conditioner, Tokens, Window


class Config(ControlConfig):
    """One ControlNet."""

    path: str = ""
    """File of a trained one (InstantX, diffusers, XLabs, sd-scripts); empty: a new one, made from the base."""
    image: Picture | None = None
    """Condition picture, scaled and cropped at its centre to the size of the picture that is drawn."""
    train: bool = False
    """Train it; the base stays as it is."""
    layout: Literal["latents", "pixels"] = "latents"
    """Of a new one: latents of the condition picture (InstantX, diffusers), or its pixels (XLabs, sd-scripts)."""
    double_blocks: PositiveInt = 2
    """Double blocks of a new one."""
    single_blocks: NonNegativeInt = 0
    """Single blocks of a new one (latents layout)."""
    scale: float = 1.0
    """Factor on all residuals."""
    mode: NonNegativeInt | None = None
    """Kind of condition, for union networks."""

    def problems(self, ground: Ground) -> Iterator[Problem]:
        """A condition picture is needed."""
        if self.image is None:
            yield Problem(f"control {self.name or self.type} has no condition picture", fix="give it an image")

    def build(self, site: Site) -> "Control":
        """The network on the transformer's device. Raises ConfigError or ModelFileError if it does not fit."""
        dit = site.dit
        if self.path:
            file = resolve(self.path, "controlnet")
            axes = dit.params.axes_dim
            net = site.once(("controlnet", file), lambda: load_controlnet(file, device=site.device, dtype=site.dtype, axes_dim=axes))
        else:
            generator = torch.Generator().manual_seed(site.seed)
            net = from_base(
                dit, layout=self.layout, double_blocks=self.double_blocks, single_blocks=self.single_blocks, generator=generator
            ).to(site.dtype)
        return Control(net.eval(), dit.params, self)


class Control(Base):
    """A loaded ControlNet; `prepare` and `conditioner` make it ready."""

    role = "controlnet"
    loads = ("path", "train", "layout", "double_blocks", "single_blocks")

    def __init__(self, net: ControlNet, base: FluxParams, config: Config) -> None:
        super().__init__(config, (net,))
        self.net = net
        self.base = base

    def prepare(self, scene: Scene) -> Prepared:
        """Encodes the condition picture."""
        seen = to_pixels(cover(opened(self.config.image), scene.width, scene.height))
        if self.net.control.layout == "pixels":
            return both(Residual(self, seen.to(scene.device)))
        return both(Residual(self, scene.encode(seen)))

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

    def __init__(self, control: Control, condition: Tensor) -> None:
        self.control = control
        self.condition = condition

    def hooks(self, tokens: Tokens) -> Sequence[BlockHook]:
        """Residuals of this forward, computed when the first block asks (a step cache may never ask)."""
        control, base = self.control, self.control.base
        scale = torch.tensor(control.config.scale)
        condition = self.condition if control.net.control.layout == "pixels" else pack(self.condition)
        made: list[Residuals] = []

        def residual(index: int) -> Tensor | None:
            if not made:
                made.append(control.net.residuals(tokens, condition, control.config.mode))
            found = made[0].of(index, base.depth, base.depth_single_blocks)
            return None if found is None else found * scale.to(found.device)

        return [ResidualHook(residual)]

    def tile(self, window: Window) -> Conditioner:
        """The condition's part."""
        factor = self.condition.shape[-2] // window.rows
        rows = slice(window.top * factor, (window.top + window.height) * factor)
        columns = slice(window.left * factor, (window.left + window.width) * factor)
        return Residual(self.control, self.condition[..., rows, columns])
