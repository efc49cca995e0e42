"""Which layers get an adapter, and with which rank, alpha and rate. Layer paths are file names: `dit.<bfl path>`,
`clip_l.text_model.encoder.layers.0.self_attn.q_proj`, `t5xxl.encoder.block.0.layer.0.SelfAttention.q`.

A target may be a part of a fused layer: q, k, v of `qkv`, or q, k, v, mlp of `linear1`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from fluxsmith.config.adapter import AdapterConfig
from fluxsmith.errors import ConfigError

DOUBLE, SINGLE = r"dit\.double_blocks\.\d+\.", r"dit\.single_blocks\.\d+\."
LAYER_TYPES = {
    "img_attn": DOUBLE + r"img_attn\.",
    "txt_attn": DOUBLE + r"txt_attn\.",
    "img_mlp": DOUBLE + r"img_mlp\.",
    "txt_mlp": DOUBLE + r"txt_mlp\.",
    "img_mod": DOUBLE + r"img_mod\.",
    "txt_mod": DOUBLE + r"txt_mod\.",
    "single": SINGLE + r"linear[12]$",
    "single_mod": SINGLE + r"modulation\.",
    "inputs": r"dit\.(img_in|txt_in|time_in|vector_in|guidance_in)\b",
    "clip_l": r"clip_l\.",
    "t5xxl": r"t5xxl\.",
}
PARTS = {"qkv": ("q", "k", "v"), "linear1": ("q", "k", "v", "mlp")}  # last name of a fused layer -> its parts in row order

# Whole layers of a preset: patterns that the rest of a path (without `dit.`) matches in full.
BLOCKS = (r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])", r"single_blocks\.\d+\.linear[12]")
MODULATION = (r"double_blocks\.\d+\.(img|txt)_mod\.lin", r"single_blocks\.\d+\.modulation\.lin")
WHOLE = {
    "all": BLOCKS + MODULATION,
    "blocks": BLOCKS,
    "attention": (r"double_blocks\.\d+\.(img|txt)_attn\.(qkv|proj)", r"single_blocks\.\d+\.linear1"),
    "mlp": (r"double_blocks\.\d+\.(img|txt)_mlp\.[02]", r"single_blocks\.\d+\.linear2"),
    "inputs": (r"img_in|txt_in|(time_in|vector_in|guidance_in)\.(in|out)_layer",),
    "everything": (r".*",),
}
# SimpleTuner's sets name layers of diffusers; `:q,k,v` are the parts of a fused layer that they hit.
IMAGE_ATTENTION = (r"double_blocks\.\d+\.img_attn\.qkv:q,k,v", r"double_blocks\.\d+\.img_attn\.proj")
TEXT_ATTENTION = (r"double_blocks\.\d+\.txt_attn\.qkv:q,k,v", r"double_blocks\.\d+\.txt_attn\.proj")
SINGLE_ATTENTION = (r"single_blocks\.\d+\.linear1:q,k,v",)
ALL = IMAGE_ATTENTION + TEXT_ATTENTION + SINGLE_ATTENTION
TEXT_MLP = (r"double_blocks\.\d+\.txt_mlp\.[02]",)
FEED_FORWARD = (
    r"double_blocks\.\d+\.img_mlp\.[02]",
    *TEXT_MLP,
    r"single_blocks\.\d+\.linear1:mlp",
    r"single_blocks\.\d+\.linear2",
    r"final_layer\.linear",
)
SIMPLETUNER = {
    "all": ALL,
    "all+ffs": ALL + FEED_FORWARD,
    "all+ffs+embedder": (*ALL, *FEED_FORWARD, r"img_in"),
    "context": TEXT_ATTENTION,
    "context+ffs": TEXT_ATTENTION + TEXT_MLP,
    "mmdit": IMAGE_ATTENTION + SINGLE_ATTENTION,
    "ai-toolkit": ALL + FEED_FORWARD + MODULATION,
    "tiny": (r"single_blocks\.(7|20)\.linear2",),
    "nano": (r"single_blocks\.7\.linear2",),
}
PRESETS: Mapping[str, tuple[str, ...]] = {
    **{name: patterns for name, patterns in SIMPLETUNER.items() if name != "all"},
    **{f"simpletuner:{name}": patterns for name, patterns in SIMPLETUNER.items()},
    **WHOLE,
}

KOHYA_PREFIXES = {"dit": "lora_unet_", "clip_l": "lora_te1_", "t5xxl": "lora_te3_"}
KOHYA = "kohya:"  # a pattern that begins so is searched in the layer's name of sd-scripts

Value = TypeVar("Value")

CLIP_LAYERS = tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")) + ("mlp.fc1", "mlp.fc2")
T5_LAYERS = tuple(f"layer.0.SelfAttention.{name}" for name in "qkvo") + tuple(
    f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")
)


class Layer(NamedTuple):
    """A linear layer of a model."""

    path: str
    in_features: int
    out_features: int


class Target(NamedTuple):
    """One adapter to be made. `part` is empty for a whole layer; `lr` None is the run's rate."""

    layer: Layer
    part: str
    rank: int
    alpha: float
    lr: float | None = None

    @property
    def name(self) -> str:
        """`dit.double_blocks.0.img_attn.qkv`, or `....qkv:q` for a part."""
        return f"{self.layer.path}:{self.part}" if self.part else self.layer.path

    @property
    def rows(self) -> tuple[int, int]:
        """Output rows that the target covers."""
        return part_rows(self.layer, self.part)


def kohya_name(path: str) -> str:
    """sd-scripts' name of a layer: `lora_unet_double_blocks_0_img_attn_qkv`, `lora_te1_text_model_encoder_layers_0_mlp_fc1`."""
    role, _, rest = path.partition(".")
    return KOHYA_PREFIXES[role] + rest.replace(".", "_")


def hits(pattern: str, name: str) -> bool:
    """Is the pattern found in a target's name (`dit.double_blocks.0.img_attn.qkv:q`), or, after `kohya:`, in its name of sd-scripts?"""
    if pattern.startswith(KOHYA):
        return re.search(pattern.removeprefix(KOHYA), kohya_name(name.partition(":")[0])) is not None
    return re.search(pattern, name) is not None


def clip_layers(count: int) -> list[str]:
    """Adaptable layers of CLIP-L, in sd-scripts' order."""
    return [f"clip_l.text_model.encoder.layers.{i}.{name}" for i in range(count) for name in CLIP_LAYERS]


def t5_layers(count: int) -> list[str]:
    """Adaptable layers of T5."""
    return [f"t5xxl.encoder.block.{i}.{name}" for i in range(count) for name in T5_LAYERS]


def parts_of(path: str) -> tuple[str, ...]:
    """Names of the parts of a fused layer; empty for other layers."""
    return PARTS.get(path.rsplit(".", 1)[-1], ())


def part_rows(layer: Layer, part: str) -> tuple[int, int]:
    """First and last + 1 output row of a part: q, k and v are as many rows as the layer has inputs, mlp is the rest."""
    if not part:
        return 0, layer.out_features
    index, width = parts_of(layer.path).index(part), layer.in_features
    return index * width, layer.out_features if part == "mlp" else (index + 1) * width


def select(config: AdapterConfig, layers: Iterable[Layer], *, split: bool = False) -> list[Target]:
    """The targets of a config among the layers of the loaded models, in the layers' order.

    `split` gives every part of a fused layer an adapter of its own. Raises ConfigError for a pattern or a block that hits
    nothing, and when nothing at all is left.
    """
    layers = list(layers)
    chosen = _chosen(config, [layer for layer in layers if layer.path.startswith("dit.")], split=split)
    chosen += [(layer, "") for layer in layers if layer.path.split(".", 1)[0] in config.text_encoders]
    _check_blocks(config, layers)
    targets = [target for layer, part in chosen if (target := _target(config, layer, part)) is not None]
    if not targets:
        raise ConfigError("the adapter has no layer to train", fix='widen adapter.targets, for example "all"')
    return targets


def _chosen(config: AdapterConfig, layers: Sequence[Layer], *, split: bool) -> list[tuple[Layer, str]]:
    wanted = (config.targets,) if isinstance(config.targets, str) else config.targets
    chosen_parts: dict[str, set[str]] = {}
    for item in wanted:
        found = _preset_hits(PRESETS[item], layers) if item in PRESETS else _pattern_hits(item, layers)
        if not found and item not in PRESETS:
            raise ConfigError(f"adapter.targets: {item!r} hits no layer", fix=f"use a preset ({', '.join(PRESETS)}) or another pattern")
        for path, part in found:
            chosen_parts.setdefault(path, set()).add(part)
    chosen = []
    for layer in layers:
        parts = chosen_parts.get(layer.path, set())
        if "" in parts:
            fused = parts_of(layer.path)
            chosen += [(layer, part) for part in fused] if split and fused else [(layer, "")]
        else:
            chosen += [(layer, part) for part in parts_of(layer.path) if part in parts]
    return chosen


def _preset_hits(patterns: Sequence[str], layers: Sequence[Layer]) -> list[tuple[str, str]]:
    found = []
    for pattern in patterns:
        body, _, parts = pattern.partition(":")
        compiled = re.compile(body)
        for layer in layers:
            if compiled.fullmatch(layer.path.removeprefix("dit.")):
                found += [(layer.path, part) for part in parts.split(",")]
    return found


def _pattern_hits(pattern: str, layers: Sequence[Layer]) -> list[tuple[str, str]]:
    try:
        re.compile(pattern.removeprefix(KOHYA))
    except re.error as error:
        presets = ", ".join(PRESETS)
        raise ConfigError(f"adapter.targets: {pattern!r} is neither a preset nor a pattern", why=str(error), fix=f"use {presets}") from None
    return [(layer.path, "") for layer in layers if hits(pattern, layer.path)]


def _target(config: AdapterConfig, layer: Layer, part: str) -> Target | None:
    name = f"{layer.path}:{part}" if part else layer.path
    if any(hits(pattern, name) for pattern in config.exclude) or not _in_blocks(config, layer.path):
        return None
    by_type: dict[str, int] = {str(kind): rank for kind, rank in config.rank_by_type.items()}
    rank = last_match(config.rank_by_pattern, name, by_type.get(layer_type(layer.path), config.rank))
    if not rank:
        return None
    alpha = last_match(config.alpha_by_pattern, name, config.alpha or rank)
    role_lr = {"dit": config.dit_lr, "clip_l": config.clip_l_lr, "t5xxl": config.t5xxl_lr}[layer.path.split(".", 1)[0]]
    return Target(layer, part, rank, float(alpha), last_match(config.lr_by_pattern, name, role_lr))


def layer_type(path: str) -> str:
    """The kind of layer that `rank_by_type` names; empty for the final layer and the like."""
    return next((name for name, pattern in LAYER_TYPES.items() if re.match(pattern, path)), "")


def last_match(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """The value of the last pattern that hits the name."""
    return next((value for pattern, value in reversed([*patterns.items()]) if hits(pattern, name)), default)


def block_numbers(text: str) -> set[int] | None:
    """`0,1,8-12` -> {0, 1, 8, 9, 10, 11, 12}; None for `all`."""
    if text in ("all", "none"):
        return None if text == "all" else set()
    numbers: set[int] = set()
    for item in text.split(","):
        first, _, last = item.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def _in_blocks(config: AdapterConfig, path: str) -> bool:
    for stack, text in (("dit.double_blocks.", config.double_blocks), ("dit.single_blocks.", config.single_blocks)):
        numbers = block_numbers(text)
        if path.startswith(stack) and numbers is not None:
            return int(path[len(stack) :].split(".", 1)[0]) in numbers
    return True


def _check_blocks(config: AdapterConfig, layers: Sequence[Layer]) -> None:
    for option, text in (("double_blocks", config.double_blocks), ("single_blocks", config.single_blocks)):
        stack = f"dit.{option}."
        there = {int(layer.path[len(stack) :].split(".", 1)[0]) for layer in layers if layer.path.startswith(stack)}
        beyond = sorted((block_numbers(text) or set()) - there)
        if beyond:
            fix = f"use 0 to {max(there, default=0)}"
            raise ConfigError(f"adapter.{option}: the model has no block {', '.join(map(str, beyond))}", fix=fix)
