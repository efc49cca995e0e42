"""A transformer of three double and five single blocks, and an input for it: enough blocks to swap some."""

from dataclasses import replace

import tiny_run
import torch

from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.linear import Linear, xavier_
from fluxsmith.models.packing import image_ids, text_ids
from fluxsmith.models.stream import Tokens


def dit() -> FluxDiT:
    generator = torch.Generator().manual_seed(0)
    made = FluxDiT(replace(tiny_run.flux_params(), depth=3, depth_single_blocks=5))
    for module in made.modules():
        if isinstance(module, Linear):
            xavier_(module, generator)
    return made.requires_grad_(False)


def tokens() -> Tokens:
    generator = torch.Generator().manual_seed(1)
    img, txt = torch.randn(1, 4, 64, generator=generator), torch.randn(1, 3, tiny_run.TEXT, generator=generator)
    y, t = torch.randn(1, tiny_run.TEXT, generator=generator), torch.tensor([0.5])
    return Tokens(img, image_ids(1, 4, 4), txt, text_ids(1, 3), y, t, torch.ones(1))
