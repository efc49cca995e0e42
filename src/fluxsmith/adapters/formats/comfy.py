"""ComfyUI's own: `diffusion_model.<BFL layer>.lora_down.weight` with alpha (written); also read with lora_A / lora_B and bare BFL names.

Text encoders are `text_encoders.clip_l.transformer.<layer>` and `text_encoders.t5xxl.transformer.<layer>`.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fluxsmith.adapters.formats.dotted import no_replacements, read_layers, written
from fluxsmith.adapters.formats.naming import find, whole
from fluxsmith.adapters.formats.state import AdapterState

PREFIXES = {"dit": "diffusion_model.", "clip_l": "text_encoders.clip_l.transformer.", "t5xxl": "text_encoders.t5xxl.transformer."}


def matches(keys: Iterable[str]) -> bool:
    """Are these keys of this format?"""
    return any(key.startswith((*PREFIXES.values(), "double_blocks.", "single_blocks.")) for key in keys)


def read(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AdapterState:
    """Tensors of a file -> layers. Raises ModelFileError for names and sizes that do not fit."""
    return read_layers(tensors, metadata, find, name="comfy")


def write(state: AdapterState, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Layers -> tensors, no metadata. Raises ModelFileError for kinds that have no form as whole layers."""
    no_replacements(state, "ComfyUI's format")
    named = []
    for path, layer in state.layers.items():
        role, _, rest = path.partition(".")
        named.append((PREFIXES[role] + rest, whole(path, layer)))
    return written(named, "down_up", dtype, folds=False), {}
