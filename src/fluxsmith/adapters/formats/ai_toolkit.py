"""ai-toolkit: diffusers' names without a header entry; a LoRA's strength is folded in, LoKr and the like keep their alpha.

The strength goes into lora_A, and factors of two move from lora_B to lora_A while lora_A stays the smaller one: so does
sd-scripts' converter, and powers of two cost no precision. Text encoders keep their PEFT names.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fluxsmith.adapters.formats import peft
from fluxsmith.adapters.formats.dotted import folded, no_replacements, written
from fluxsmith.adapters.formats.naming import in_diffusers
from fluxsmith.adapters.formats.state import AdapterState, Part


def matches(keys: Iterable[str]) -> bool:
    """Are these keys of this format? (They are PEFT's.)"""
    return peft.matches(keys)


def read(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AdapterState:
    """Tensors of a file -> layers. Raises ModelFileError for names and sizes that do not fit."""
    return peft.read(tensors, metadata)


def write(state: AdapterState, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Layers -> tensors, no metadata. Raises ModelFileError for layers and kinds that cannot be said in diffusers' names."""
    no_replacements(state, "ai-toolkit's format")
    named = [
        (f"{peft.ROLES[path.split('.', 1)[0]]}.{name}", _balanced(part))
        for path, layer in state.layers.items()
        for name, part in in_diffusers(path, layer)
    ]
    return written(named, "a_b", dtype, folds=True), {}


def _balanced(part: Part) -> Part:
    """Strength 1, shared out over both factors: up gets 1, 1/2, 1/4, ... of it, down the rest."""
    if part.kind != "lora" or part.scale == 1:
        return part
    if part.scale <= 0:  # nothing to share out
        return folded(part)
    down, up = part.scale, 1.0
    while 2 * down < up:
        down, up = 2 * down, up / 2
    tensors = {**part.tensors, "down": part.down * down, "up": part.up * up if up != 1 else part.up}
    return part.having(tensors=tensors, alpha=float(part.rank))
