"""Files of random networks that go with the tiny transformer of tiny_run.py: every part of them does something."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import tiny_run
import torch
from torch import nn

from fluxsmith.controls.controlnet_model import ControlNet, ControlNetParams, Layout, file_tensors
from fluxsmith.controls.infiniteyou_model import FaceProjector, FaceProjectorParams
from fluxsmith.controls.ip_adapter_model import IpAdapter, IpAdapterParams, Kind
from fluxsmith.io.safetensors import save_weights
from fluxsmith.models.flux import FluxParams
from fluxsmith.models.vision_encoders import ROOT, ClipVision, SiglipVision, VisionParams


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


def vision_params(kind: Literal["siglip", "clip"]) -> VisionParams:
    """A tower of pictures of 16 x 16 with four patches and vectors of 24 numbers."""
    return VisionParams(24, 32, 1, 2, 16, 8, 24 if kind == "clip" else 0)


def vision_file(path: Path, kind: Literal["siglip", "clip"], seed: int = 0) -> Path:
    """An image encoder."""
    tower = SiglipVision(vision_params(kind)) if kind == "siglip" else ClipVision(vision_params(kind))
    prefix = ROOT if kind == "siglip" else ""
    tensors = {f"{prefix}{key}": value for key, value in randomise(tower.model, seed, 0.5).state_dict().items()}
    save_weights(path, tensors, {"fluxsmith.model": json.dumps({"num_attention_heads": 2})})
    return path


def ip_adapter_file(path: Path, kind: Kind, *, seed: int = 0, layers: int | None = None) -> Path:
    """An IP-Adapter of two tokens a picture, in its maker's names."""
    base = tiny_run.flux_params()
    blocks = base.depth + (base.depth_single_blocks if kind == "instantx" else 0)
    net = IpAdapter(IpAdapterParams(kind, 24, 2, 12, base.hidden_size, blocks if layers is None else layers))
    randomise(net, seed, 0.5)
    save_weights(path, {theirs(key, kind): value for key, value in net.state_dict().items()}, {})
    return path


def theirs(key: str, kind: Kind) -> str:
    """Our name of an IP-Adapter's tensor as its maker writes it."""
    place, _, rest = key.partition(".")
    if place != "layers":
        return f"image_proj.{key}" if kind == "instantx" else "ip_adapter_proj_model." + key.replace("proj.0", "proj")
    number, part, leaf = rest.split(".")
    if kind == "instantx":
        return f"ip_adapter.{number}.to_{part}_ip.{leaf}"
    return f"double_blocks.{number}.processor.ip_adapter_double_stream_{part}_proj.{leaf}"


def face_projector_file(path: Path, *, seed: int = 0, text: int = tiny_run.TEXT) -> Path:
    """A face projector for vectors of 8 numbers, in the published nested names."""
    net = FaceProjector(FaceProjectorParams(8, 3, 12, 16, 24, 1, text, 2))
    randomise(net, seed, 0.5)
    hints = {"fluxsmith.model": json.dumps({"num_attention_heads": 2})}
    save_weights(path, {f"image_proj.{key}": value for key, value in net.state_dict().items()}, hints)
    return path
