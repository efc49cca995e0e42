"""Dotted names: PEFT / diffusers `transformer.transformer_blocks.0.attn.to_q.lora_A.weight` (written and read), and read only:
ComfyUI `diffusion_model.<bfl>`, `base_model.model.<bfl>`, DiffSynth `blocks.0.attn.a_to_qkv.lora_A.default.weight`.

q, k, v have factors of their own here. When written, the strength is folded into lora_B, and the metadata says alpha = rank,
so that loaders which ignore the metadata do the same.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxsmith.adapters.formats.kohya import BFL
from fluxsmith.adapters.formats.pairs import Pair, grouped, in_bfl_order, layers_from, pair
from fluxsmith.adapters.formats.state import AdapterState, LayerState, Part
from fluxsmith.adapters.targets import parts_of
from fluxsmith.errors import ModelFileError
from fluxsmith.io.keymaps import MAPS, LayerMap, Place
from fluxsmith.io.keymaps.apply import swap_halves

METADATA_KEY = "lora_adapter_metadata"
DIT_PREFIXES = ("base_model.model.transformer.", "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "")
TEXT_PREFIXES = {"text_encoder.": "clip_l.", "text_encoder_2.": "t5xxl."}
ROLES = {"dit": "transformer", "clip_l": "text_encoder", "t5xxl": "text_encoder_2"}
TABLES = (BFL, MAPS["diffusers"], MAPS["diffsynth"])


class Found(NamedTuple):
    """Where a name belongs, and in which naming."""

    place: Place
    table: LayerMap | None


def find(name: str) -> Found | None:
    """The layer (part) that a dotted name means."""
    for prefix, role in TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return Found(Place(role + name.removeprefix(prefix)), None)
    for prefix in DIT_PREFIXES:
        if name.startswith(prefix):
            for table in TABLES:
                place = table.bfl_layer(name.removeprefix(prefix))
                if place is not None:
                    return Found(place._replace(name=f"dit.{place.name}"), table)
    return None


def read(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AdapterState:
    """Tensors of a file -> layers; alpha from the tensors, else from the metadata, else alpha = rank. Raises ModelFileError."""
    alphas = _Alphas(metadata)
    pairs = []
    for name, own in grouped(tensors).items():
        found = find(name)
        item = pair(name, found.place if found else None, own)
        if found and found.table:
            item = in_bfl_order(item, found.table)
        pairs.append(item if item.alpha is not None else item._replace(alpha=alphas.of(item)))
    return AdapterState(layers_from(pairs), dict(metadata), "peft")


class _Alphas:
    """Strengths as PEFT's config in the header gives them."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        try:
            content = json.loads(metadata.get(METADATA_KEY, "{}"))
        except ValueError as error:
            raise ModelFileError(f"header entry {METADATA_KEY} is not JSON", why=str(error)) from error
        self.values: dict[str, Any] = content if isinstance(content, dict) else {}

    def of(self, item: Pair) -> float | None:
        """Alpha of one pair in the sense alpha / rank; None if nothing is said."""
        role, _, layer = item.name.partition(".")
        if role not in ROLES.values():
            role, layer = "transformer", item.name
        alpha = _by_pattern(self.values.get(f"{role}.alpha_pattern"), layer, self.values.get(f"{role}.lora_alpha"))
        if alpha is None:
            return None
        rank = item.down.shape[0]
        return float(alpha) * rank**0.5 if self.values.get(f"{role}.use_rslora") else float(alpha)


def _by_pattern(patterns: object, layer: str, default: float | None) -> float | None:
    """PEFT's rule: a pattern matches the end of a layer's name."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def write(state: AdapterState, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Layers -> tensors and the metadata entry. Raises ModelFileError for a layer that diffusers has no name for."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, dict[str, int]] = {}
    for path, layer in state.layers.items():
        for name, part in _named_parts(path, layer):
            role = path.split(".", 1)[0]
            key = f"{ROLES[role]}.{name}"
            tensors[f"{key}.lora_A.weight"] = part.down.to(dtype)
            tensors[f"{key}.lora_B.weight"] = (part.up * part.scale).to(dtype)
            ranks.setdefault(role, {})[name] = part.rank
    config: dict[str, Any] = {}
    for role, own in ranks.items():
        config |= {f"{ROLES[role]}.{name}": value for name, value in peft_config(own).items()}
    return tensors, {METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}


def peft_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The LoraConfig of layers with these ranks and alpha = rank everywhere."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(name).replace(r"\.", "."): rank for name, rank in ranks.items() if rank != common}
    return {
        "r": common, "lora_alpha": common, "rank_pattern": others, "alpha_pattern": dict(others), "target_modules": sorted(ranks),
        "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False, "lora_bias": False,
    }  # fmt: skip


def _named_parts(path: str, layer: LayerState) -> list[tuple[str, Part]]:
    """Layer names of diffusers (without the model's prefix) with their factors; a whole fused layer shares its down factor."""
    role, _, rest = path.partition(".")
    if role != "dit":
        return [(rest, part) for part in layer.parts]
    table = MAPS["diffusers"]
    names = table.layer(rest)
    if names is None:
        raise ModelFileError(f"diffusers has no layer like {rest}", fix='write the file with format = "kohya"')
    if len(names) == 1:
        part = layer.parts[0]
        return [(names[0], part._replace(up=swap_halves(part.up)) if rest in table.swapped else part)]
    parts = [cut for part in layer.parts for cut in (_cut(part, len(names)) if not part.name else [part])]
    return [(names[parts_of(path).index(part.name)], part) for part in parts]


def _cut(part: Part, count: int) -> list[Part]:
    """A whole fused layer as its parts: the same down, the rows of up."""
    width = part.down.shape[1]
    names = ("q", "k", "v", "mlp")[:count]
    stops = [width, 2 * width, part.stop if count == 3 else 3 * width, part.stop][:count]
    starts = [0, *stops[:-1]]
    return [Part(name, a, b, part.down, part.up[a:b], part.alpha) for name, a, b in zip(names, starts, stops, strict=True)]
