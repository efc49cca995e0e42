"""ControlNet beside the transformer: `[[control]] type = "controlnet" train = true`, or `path = "..."` for one that exists.

Without a path the network starts as a copy of the base's first blocks, so that training begins with what the base knows.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from fluxsmith.config.section import PluginConfig
from fluxsmith.controls.base import ResidualHook, Unchanged
from fluxsmith.controls.controlnet_model import ControlNet, from_base, load_controlnet
from fluxsmith.errors import DataError
from fluxsmith.io.sources import resolve
from fluxsmith.models.assembly import Models
from fluxsmith.models.flux import FluxDiT, FluxParams
from fluxsmith.models.packing import pack
from fluxsmith.models.stream import BlockHook, Tokens


class Config(PluginConfig):
    """One ControlNet."""

    path: str = ""
    """File of a trained one (InstantX, diffusers, XLabs, sd-scripts); empty: a new one, made from the base."""
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

    def build(self, dit: FluxDiT, *, dtype: torch.dtype, seed: int) -> "Control":
        """The network on the transformer's device. Raises ConfigError or ModelFileError if it does not fit."""
        device = next(dit.parameters()).device
        if self.path:
            net = load_controlnet(resolve(self.path, "controlnet"), device=device, dtype=dtype, axes_dim=dit.params.axes_dim)
        else:
            generator = torch.Generator().manual_seed(seed)
            net = from_base(
                dit, layout=self.layout, double_blocks=self.double_blocks, single_blocks=self.single_blocks, generator=generator
            ).to(dtype)
        return Control(net.eval(), dit.params, scale=self.scale, mode=self.mode)


class Control:
    """A loaded ControlNet; `conditioner` makes it ready for one batch."""

    role = "controlnet"

    def __init__(self, net: ControlNet, base: FluxParams, *, scale: float = 1.0, mode: int | None = None) -> None:
        self.net = net
        self.base = base
        self.scale = torch.tensor(scale)
        self.mode = mode

    @property
    def needs(self) -> tuple[str, ...]:
        """Parts that must be loaded while it is used."""
        return ("ae",) if self.net.control.layout == "latents" else ()

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
            return Residual(self, pack(models.ae.encode(pixels.to(next(models.ae.parameters()).dtype))))


class Residual(Unchanged):
    """A ControlNet with its condition (as its layout wants it): the Conditioner of one batch."""

    def __init__(self, control: Control, condition: Tensor) -> None:
        self.control = control
        self.condition = condition

    def hooks(self, tokens: Tokens) -> Sequence[BlockHook]:
        """Residuals of this forward, computed now."""
        net, base, scale = self.control.net, self.control.base, self.control.scale
        made = net.residuals(tokens, self.condition, self.control.mode)

        def residual(index: int) -> Tensor | None:
            found = made.of(index, base.depth, base.depth_single_blocks)
            return None if found is None else found * scale.to(found.device)

        return [ResidualHook(residual)]
