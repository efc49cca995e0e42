"""LoRA files with random factors for the tiny base, the base with a LoRA merged in by hand, and what files hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxsmith.adapters.formats.files import read_adapter, with_heights, write_adapter
from fluxsmith.adapters.formats.state import AdapterState, LayerState, lora_part
from fluxsmith.io.keymaps import MAPS
from fluxsmith.io.keymaps.apply import disassemble
from fluxsmith.io.safetensors import open_weights, save_weights

LAYERS = ("double_blocks.0.img_attn.qkv", "double_blocks.1.txt_mlp.0", "single_blocks.2.linear1", "single_blocks.0.modulation.lin")


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Everything in a file."""
    with open_weights(path) as weights:
        return {name: weights.tensor(name) for name in weights}


def metadata_of(path: Path) -> dict[str, str]:
    """Header entries."""
    with open_weights(path) as weights:
        return weights.metadata


def deltas_of(path: Path, base: Path | None = None) -> dict[str, Tensor]:
    """What each layer of a LoRA file adds at strength 1."""
    state = read_adapter(path)
    if base is not None:
        with open_weights(base) as weights:
            state = with_heights(state, {f"dit.{name.removesuffix('.weight')}": weights.infos[name].shape[0] for name in weights})
    return {name: layer.delta() for name, layer in state.layers.items()}


def write_lora(path: Path, base: Path, *, seed: int, rank: int = 3, alpha: float = 2.0, **options: Any) -> Path:
    """Random factors for `layers` of the base, in `format`."""
    generator = torch.Generator().manual_seed(seed)
    with open_weights(base) as weights:
        shapes = {layer: weights.infos[f"{layer}.weight"].shape for layer in options.get("layers", LAYERS)}
    made = {}
    for layer, (rows, inputs) in shapes.items():
        down, up = torch.randn(rank, inputs, generator=generator), torch.randn(rows, rank, generator=generator)
        made[f"dit.{layer}"] = LayerState((lora_part("", 0, rows, down * 0.1, up * 0.1, alpha),), rows)
    metadata = {"ss_network_dim": str(rank), "ss_network_alpha": str(alpha), "modelspec.title": path.stem}
    dtype = options.get("dtype", torch.float32)
    write_adapter(path, AdapterState(made), format=options.get("format", "kohya"), dtype=dtype, metadata=metadata)
    return path


def merged_by_hand(base: Path, target: Path, loras: Mapping[Path, float], *, role: str = "dit") -> Path:
    """base + the sum of strength * delta, fp32."""
    tensors = tensors_of(base)
    for lora, strength in loras.items():
        for path, delta in deltas_of(lora, base).items():
            if path.startswith(f"{role}."):
                tensors[f"{path.removeprefix(f'{role}.')}.weight"] += strength * delta
    save_weights(target, tensors, {})
    return target


def diffusers_folder(base: Path, folder: Path) -> Path:
    """The transformer as diffusers stores it: `transformer/` with two shards."""
    made: dict[str, Tensor] = {}
    tensors = tensors_of(base)
    for key, tensor in tensors.items():
        recipe = MAPS["diffusers"].recipe(key)
        assert recipe is not None
        made |= {name: part.contiguous() for name, part in disassemble(recipe, tensor, tensors["img_in.weight"].shape[0]).items()}
    (folder / "transformer").mkdir(parents=True)
    names = sorted(made)
    for number in (0, 1):
        file = folder / f"transformer/diffusion_pytorch_model-0000{number + 1}-of-00002.safetensors"
        save_weights(file, {name: made[name] for name in names[number::2]}, {"format": "pt"})
    return folder
