"""Random LoRA files for every layer of a small transformer's blocks."""

from pathlib import Path
from typing import Any

import torch

from fluxsmith.adapters.formats.files import write_adapter
from fluxsmith.adapters.formats.state import AdapterState, LayerState, lora_part
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.linear import Linear


def block_layers(dit: FluxDiT) -> dict[str, Linear]:
    """All linears of the blocks by their names."""
    return {name: module for name, module in dit.named_modules() if isinstance(module, Linear) and "_blocks." in name}


def write_lora(path: Path, dit: FluxDiT, *, seed: int = 1, leave_out: str = "none", kind: Any = "kohya") -> Path:
    """Rank 2, without the layers whose names contain `leave_out`."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, layer in block_layers(dit).items():
        if leave_out not in name:
            down, up = (torch.randn(size, generator=generator) for size in ((2, layer.in_features), (layer.out_features, 2)))
            made[f"dit.{name}"] = LayerState((lora_part("", 0, layer.out_features, down, up, 1.0),), layer.out_features)
    write_adapter(path, AdapterState(made), format=kind, dtype=torch.float32)
    return path
