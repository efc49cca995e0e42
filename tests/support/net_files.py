"""Files of random networks that go with the tiny transformer of tiny_run.py: every part of them does something."""

from dataclasses import replace
from pathlib import Path

import tiny_run
import torch
from torch import nn

from fluxsmith.controls.controlnet_model import ControlNet, ControlNetParams, Layout, file_tensors
from fluxsmith.io.safetensors import save_weights
from fluxsmith.models.flux import FluxParams


@torch.no_grad()
def randomise(net: nn.Module, seed: int, size: float = 0.2) -> nn.Module:
    """Normal numbers in all parameters; those of norms stay about one."""
    generator = torch.Generator().manual_seed(seed)
    for name, param in net.named_parameters():
        param.copy_(torch.randn(param.shape, generator=generator) * size + (1.0 if "norm" in name and param.dim() == 1 else 0.0))
    return net


def controlnet(
    *, seed: int = 0, channels: int = 64, modes: int = 0, layout: Layout = "latents", base: FluxParams | None = None
) -> ControlNet:
    trunk = replace(base or tiny_run.flux_params(), depth=1, depth_single_blocks=0)
    net = ControlNet(ControlNetParams(trunk, layout, channels, modes))
    randomise(net, seed)
    return net.eval().requires_grad_(False)


def controlnet_file(path: Path, **options: object) -> Path:
    """`controlnet_file(folder / "union.safetensors", modes=7)`."""
    net = controlnet(**options)  # type: ignore[arg-type]  # passed on
    save_weights(path, file_tensors(net, net.state_dict()), {})
    return path
