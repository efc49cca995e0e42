"""PEFT / diffusers: `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`, DoRA as `lora_magnitude_vector`.

q, k, v have factors of their own here. When written, the strength is folded into lora_B, and the metadata says alpha = rank,
so that loaders which ignore the metadata do the same.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fluxsmith.adapters.formats.dotted import no_replacements, only_lora, read_layers, written
from fluxsmith.adapters.formats.entries import Entry
from fluxsmith.adapters.formats.naming import find, in_diffusers
from fluxsmith.adapters.formats.state import AdapterState
from fluxsmith.errors import ModelFileError

METADATA_KEY = "lora_adapter_metadata"
ROLES = {"dit": "transformer", "clip_l": "text_encoder", "t5xxl": "text_encoder_2"}
NAME = re.compile(r"(transformer|text_encoder(_2)?)\.|(single_)?transformer_blocks\.")


def matches(keys: Iterable[str]) -> bool:
    """Are these keys of this format?"""
    return any(NAME.match(key) for key in keys)


def read(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AdapterState:
    """Tensors of a file -> layers; alpha from the tensors, else from the metadata, else alpha = rank. Raises ModelFileError."""
    return read_layers(tensors, metadata, find, name="peft", alphas=_Alphas(metadata).of)


class _Alphas:
    """Strengths as PEFT's config in the header gives them."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        try:
            content = json.loads(metadata.get(METADATA_KEY, "{}"))
        except ValueError as error:
            raise ModelFileError(f"header entry {METADATA_KEY} is not JSON", why=str(error)) from error
        self.values: dict[str, Any] = content if isinstance(content, dict) else {}

    def of(self, item: Entry) -> float | None:
        """Alpha of one adapter in the sense alpha / rank; None if nothing is said."""
        role, _, layer = item.name.partition(".")
        if role not in ROLES.values():
            role, layer = "transformer", item.name
        alpha = _by_pattern(self.values.get(f"{role}.alpha_pattern"), layer, self.values.get(f"{role}.lora_alpha"))
        if alpha is None or not item.rank:
            return None
        return float(alpha) * item.rank**0.5 if self.values.get(f"{role}.use_rslora") else float(alpha)


def _by_pattern(patterns: object, layer: str, default: float | None) -> float | None:
    """PEFT's rule: a pattern matches the end of a layer's name."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def write(state: AdapterState, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Layers -> tensors and the metadata entry. Raises ModelFileError for what diffusers has no name for, and other kinds."""
    only_lora(state, "PEFT's format", dora=True, bias=True)
    no_replacements(state, "PEFT's format")
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for role in state.roles():
        named = [pair for path, layer in state.layers.items() if path.startswith(f"{role}.") for pair in in_diffusers(path, layer)]
        tensors |= written(((f"{ROLES[role]}.{name}", part) for name, part in named), "a_b", dtype, folds=True)
        dora = any("magnitude" in part.tensors for _, part in named)
        biases = any("bias" in part.tensors for _, part in named)
        made = peft_config({name: part.rank for name, part in named}) | {"use_dora": dora, "lora_bias": biases}
        config |= {f"{ROLES[role]}.{name}": value for name, value in made.items()}
    return tensors, {METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}


def peft_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The LoraConfig of layers with these ranks and alpha = rank everywhere."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(name).replace(r"\.", "."): rank for name, rank in ranks.items() if rank != common}
    return {
        "r": common, "lora_alpha": common, "rank_pattern": others, "alpha_pattern": dict(others), "target_modules": sorted(ranks),
        "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False, "lora_bias": False,
    }  # fmt: skip
