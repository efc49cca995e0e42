"""ControlNet networks (Zhang et al. 2023): a short FLUX trunk whose blocks' outputs, through one linear each, are residuals.

Two layouts exist. `latents` (InstantX, diffusers): the condition is an encoded picture, packed; residual of block k of n is
k // ceil(n / r). `pixels` (XLabs, sd-scripts): small convolutions reduce the picture itself; residual k modulo r, double blocks only.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from fluxsmith.errors import ConfigError
from fluxsmith.io.canonical import Source, canonical
from fluxsmith.io.identify import require_role
from fluxsmith.io.keymaps import MAPS
from fluxsmith.io.keymaps.apply import disassemble
from fluxsmith.io.scaled import open_scaled
from fluxsmith.models.fill import check_keys, fill, finish, meta, shapes_of
from fluxsmith.models.flux import FluxDiT, FluxParams
from fluxsmith.models.linear import Linear
from fluxsmith.models.packing import pack
from fluxsmith.models.stream import Stream, Tokens

Layout = Literal["latents", "pixels"]
HINT_CHANNELS = 16
HINT_STRIDES = (1, 1, 2, 1, 2, 1, 2, 1)  # of the convolutions at places 0, 2, ..., 14: the picture shrinks eightfold
FORM = "fluxsmith.model"


@dataclass(frozen=True)
class ControlNetParams:
    """Sizes of the trunk, and what is special."""

    trunk: FluxParams
    layout: Layout
    condition_channels: int
    modes: int = 0

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]], axes_dim: Sequence[int] | None = None) -> "ControlNetParams":
        """Everything from tensor shapes in our names. Raises ModelFileError if a key that carries a size is missing."""
        channels = shapes.get("img_in.weight", (0, 1))[1]
        trunk = FluxParams.from_shapes({**shapes, "final_layer.linear.weight": (channels,)}, axes_dim)
        if "input_hint_block.0.weight" in shapes:
            return cls(trunk, "pixels", shapes["pos_embed_input.weight"][1])
        modes = shapes["controlnet_mode_embedder.weight"][0] if "controlnet_mode_embedder.weight" in shapes else 0
        return cls(trunk, "latents", shapes["controlnet_x_embedder.weight"][1], modes)


class Residuals:
    """What a ControlNet gives for one forward: one tensor (B, N, D) for each of its blocks, and the rule that spreads them."""

    def __init__(self, double: Sequence[Tensor], single: Sequence[Tensor], layout: Layout) -> None:
        self.double, self.single, self.layout = double, single, layout

    def of(self, index: int, depth: int, depth_single: int) -> Tensor | None:
        """The residual after block `index` of a transformer of this depth; None where there is none."""
        mine, place, count = (self.double, index, depth) if index < depth else (self.single, index - depth, depth_single)
        if not mine:
            return None
        return mine[place % len(mine)] if self.layout == "pixels" else mine[place // -(-count // len(mine))]


class ControlNet(FluxDiT):
    """The trunk, the condition's way in, the residuals' way out. Keys are BFL's and those of the file layout."""

    def __init__(self, params: ControlNetParams) -> None:
        super().__init__(params.trunk)
        del self.final_layer
        self.control = params
        hidden = params.trunk.hidden_size
        self.controlnet_blocks = nn.ModuleList(Linear(hidden, hidden) for _ in range(params.trunk.depth))
        if params.trunk.depth_single_blocks:
            self.controlnet_single_blocks = nn.ModuleList(Linear(hidden, hidden) for _ in range(params.trunk.depth_single_blocks))
        if params.layout == "pixels":
            self.input_hint_block = _hint_block()
            self.pos_embed_input = Linear(params.condition_channels, hidden)
        else:
            self.controlnet_x_embedder = Linear(params.condition_channels, hidden)
        if params.modes:
            self.controlnet_mode_embedder = nn.Embedding(params.modes, hidden)

    def condition(self, condition: Tensor) -> Tensor:
        """What is added to the embedded image tokens: pixels (B, 3, H, W) in [-1, 1], or packed latents (B, N, C) -> (B, N, D)."""
        if self.control.layout == "pixels":
            return self.pos_embed_input(pack(self.input_hint_block(condition)))
        return self.controlnet_x_embedder(condition)

    def residuals(self, tokens: Tokens, condition: Tensor, mode: int | None = None) -> Residuals:
        """Run the trunk on the transformer's own input. `condition` as the layout wants it; `mode` of a union network."""
        stream = self.embed(tokens)
        n = stream.n_target
        img = stream.img[:, :n] + self.condition(condition.to(stream.img.dtype))
        stream = self._with_mode(stream._replace(img=img), mode)
        double, single = [], []
        for index, block in enumerate(self.blocks):
            mods = block.modulations(stream.vec, self.run_modulation)
            out, txt = self.call(block, stream.img, stream.txt, mods, stream.pe, stream.mask, stream.ip)
            stream = stream._replace(img=out, txt=txt)
            if index < self.params.depth:
                double.append(self.controlnet_blocks[index](out))
            else:
                single.append(self.controlnet_single_blocks[index - self.params.depth](out))
        return Residuals(double, single, self.control.layout)

    def embed(self, tokens: Tokens) -> Stream:
        """The parent's, on the denoised tokens alone: what other controls append is none of a ControlNet's business."""
        n = tokens.n_target or tokens.img.shape[1]
        own = tokens._replace(img=tokens.img[:, :n, : self.params.in_channels], img_ids=tokens.img_ids[:, :n], n_target=n)
        mask = None if tokens.mask is None else tokens.mask[..., : tokens.txt.shape[1] + n]
        if tokens.n_prompt:  # the prompt alone: texts of regions before it, and masks that go with them, are none of its business
            length, first = tokens.txt.shape[1], tokens.txt.shape[1] - tokens.n_prompt
            own = own._replace(txt=own.txt[:, first:], txt_ids=own.txt_ids[:, first:])
            mask = None if mask is None else mask[..., length : length + 1, first:]  # what of the prompt image tokens see: not its padding
        guidance = tokens.guidance if self.params.guidance_embed else None
        if self.params.guidance_embed and guidance is None:
            guidance = torch.ones_like(tokens.t)
        return super().embed(own._replace(mask=mask, guidance=guidance))

    def _with_mode(self, stream: Stream, mode: int | None) -> Stream:
        """A union network reads its mode as one more text token at the first text position."""
        if not self.control.modes:
            return stream
        if mode is None or not 0 <= mode < self.control.modes:
            raise ConfigError(f"this ControlNet has modes 0 to {self.control.modes - 1}", why=f"mode is {mode}", fix="set control.mode")
        row = self.controlnet_mode_embedder.weight[mode].to(stream.txt.dtype).expand(stream.txt.shape[0], 1, -1)
        first = stream.pe[:, :, :1]
        mask = None if stream.mask is None else torch.cat((torch.ones_like(stream.mask[..., :1]), stream.mask), dim=-1)
        return stream._replace(txt=torch.cat((row, stream.txt), dim=1), pe=torch.cat((first, stream.pe), dim=2), mask=mask)


def _hint_block() -> nn.Sequential:
    layers: list[nn.Module] = []
    for place, stride in enumerate(HINT_STRIDES):
        layers.append(nn.Conv2d(3 if place == 0 else HINT_CHANNELS, HINT_CHANNELS, 3, padding=1, stride=stride))
        layers.append(nn.SiLU())
    return nn.Sequential(*layers[:-1])


def from_base(dit: FluxDiT, *, layout: Layout, double_blocks: int, single_blocks: int, generator: torch.Generator) -> ControlNet:
    """A new network whose trunk is a copy of the base's first blocks; all residuals are zero. Raises ConfigError for more blocks than the
    base has."""
    base = dit.params
    if double_blocks > base.depth or single_blocks > base.depth_single_blocks:
        have = f"the base has {base.depth} double and {base.depth_single_blocks} single blocks"
        fix = "lower control.double_blocks or control.single_blocks"
        raise ConfigError("the ControlNet wants more blocks than the base has", why=have, fix=fix)
    trunk = replace(base, depth=double_blocks, depth_single_blocks=single_blocks)
    channels = base.in_channels
    net = ControlNet(ControlNetParams(trunk, layout, channels)).to(next(dit.parameters()).device)
    own, theirs = net.state_dict(), dit.state_dict()
    with torch.no_grad():
        for key, value in own.items():
            if key in theirs:
                value.copy_(theirs[key])
            elif "controlnet_" in key or key.startswith("input_hint_block.14.") or key.endswith("bias"):
                value.zero_()
            else:
                width = value[0].numel() ** -0.5
                value.copy_(torch.empty(value.shape).uniform_(-width, width, generator=generator))
    return net


def load_controlnet(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, axes_dim: Sequence[int] | None = None
) -> ControlNet:
    """Read a file of either layout, in eval mode. Raises ModelFileError for a wrong, incomplete or broken file."""
    identity = require_role(path, "controlnet")
    with open_scaled(path) as weights:
        sources: dict[str, Source] = canonical(weights, identity, "controlnet")
        shapes = {key: source.shape for key, source in sources.items()}
        hints = json.loads(weights.metadata.get(FORM, "{}"))
        params = ControlNetParams.from_shapes(shapes, axes_dim or hints.get("axes_dim"))
        net = meta(lambda: ControlNet(params))
        check_keys(shapes_of(net), shapes, str(path))
        fill(net, {key: source.read for key, source in sources.items()}, device=device, dtype=dtype)
        finish(net)
    return net.eval()


def file_tensors(net: ControlNet, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's tensors under the keys of its layout's files: BFL names (pixels), diffusers' names (latents)."""
    if net.control.layout == "pixels":
        return dict(tensors)
    made: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        recipe = MAPS["diffusers"].recipe(key)
        made |= {key: tensor} if recipe is None else disassemble(recipe, tensor, net.params.hidden_size)
    return {key: value.contiguous() for key, value in made.items()}
