"""Tiny random files for every control that goes with the tiny transformer of tiny_run.py, and the entries that use them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_run
import torch
from lora_sets import block_layers, write_lora
from net_files import controlnet_file, face_projector_file, ip_adapter_file, vision_file
from PIL import Image
from torch import nn

from fluxsmith.controls.lora_encoder_model import LoraEncoder, LoraEncoderParams
from fluxsmith.controls.redux_model import ReduxEmbedder
from fluxsmith.controls.value_model import ValueEncoder
from fluxsmith.io.keymaps import MAPS
from fluxsmith.io.safetensors import save_weights
from fluxsmith.models.flux import FluxDiT

Draw = Callable[..., Image.Image]
Entries = dict[str, dict[str, Any]]
VISION = 24  # of net_files.vision_file

PLAIN = ("kontext", "controlnet", "ip_adapter", "redux", "value", "lora_encoder", "eligen", "infiniteyou")


def entries_for(folder: Path, picture: Draw, mask: Draw) -> Entries:
    """Type -> a `[[control]]` table; every file is written into the folder."""
    dit = tiny_run.random_dit()
    siglip = str(vision_file(folder / "siglip.safetensors", "siglip"))
    adapter = str(ip_adapter_file(folder / "ip.safetensors", "instantx"))
    redux = random_file(ReduxEmbedder(VISION, 24, tiny_run.TEXT), folder / "redux.safetensors")
    infuse = str(controlnet_file(folder / "infuse.safetensors", seed=7))
    projector = str(face_projector_file(folder / "projector.safetensors"))
    lora = write_lora(folder / "lora.safetensors", dit)
    regions = [{"prompt": "a blue star", "mask": mask((0, 0, 32, 64))}, {"prompt": "a green ring", "mask": mask((32, 0, 64, 64))}]
    made: Entries = {
        "kontext": {"images": [picture(1, 32, 32)]},
        "controlnet": {"path": str(controlnet_file(folder / "controlnet.safetensors", seed=3)), "image": picture(2)},
        "redux": {"path": redux, "encoder": siglip, "images": [picture(3)]},
        "ip_adapter": {"path": adapter, "encoder": siglip, "images": [picture(4)]},
        "value": {"path": random_file(ValueEncoder(8, tiny_run.TEXT, 3), folder / "value.safetensors", 1.0), "value": 0.7},
        "lora_encoder": {"path": write_lora_encoder(folder / "lora_encoder.safetensors", dit), "loras": [str(lora)], "heads": 2},
        "eligen": {"entities": regions},
        "infiniteyou": {"path": infuse, "projector": projector, "embedding": tuple(0.1 * number for number in range(8)), "heads": 2},
        "fill": {"image": picture(5), "mask": mask((16, 16, 48, 48))},
        "flex2": {"image": picture(5), "mask": mask((16, 16, 48, 48)), "control_image": picture(6)},
        "structure": {"image": picture(6)},
    }  # fmt: skip
    return {name: {"type": name, **options} for name, options in made.items()}


def lora_for(folder: Path) -> Path:
    """A LoRA on every layer of the blocks."""
    return write_lora(folder / "style.safetensors", tiny_run.random_dit(), seed=9)


@torch.no_grad()
def random_file(net: nn.Module, path: Path, size: float = 0.2) -> str:
    """The net's tensors as random numbers."""
    generator = torch.Generator().manual_seed(0)
    save_weights(path, {name: torch.randn(value.shape, generator=generator) * size for name, value in net.state_dict().items()})
    return str(path)


def write_lora_encoder(path: Path, dit: FluxDiT) -> str:
    """For all layers of this transformer's blocks."""
    sizes = {MAPS["diffsynth"].layer(name)[0].replace(".", "___"): layer for name, layer in block_layers(dit).items()}  # type: ignore[index]
    params = LoraEncoderParams({name: (2, one.in_features, one.out_features) for name, one in sizes.items()}, tiny_run.TEXT, 1, 24, 1, 2)
    return random_file(LoraEncoder(params), path, 0.3)
