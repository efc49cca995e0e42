"""Where an adapter file loads: the key grammar of each loader, applied to the keys of the file. Headers only.

`verdict(path).text` is "loads in sd-scripts, ComfyUI, Forge, diffusers" or names what a loader drops. Grammars as of
sd-scripts 48d368fa, ComfyUI 2026, diffusers 0.42.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxsmith.adapters.formats import kohya, peft
from fluxsmith.adapters.formats.pairs import split_name
from fluxsmith.io.keymaps import MAPS
from fluxsmith.io.shards import read_model_header

SD_SCRIPTS_LAYERS = re.compile(  # networks/lora_flux.py: block layers, and the embedders that in_dims can name
    r"dit\.(double_blocks\.\d+\.(img|txt)_(mod\.lin|attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.(linear[12]|modulation\.lin)"
    r"|img_in|txt_in|(time_in|vector_in|guidance_in)\.(in|out)_layer)|clip_l\..*|t5xxl\..*"
)
DIFFUSERS_KOHYA_LAYERS = re.compile(  # embedders and the final layer are converted without their prefix and then dropped
    r"dit\.(double_blocks\.(?:\d|1[0-8])\.(img|txt)_(mod\.lin|attn\.(qkv|proj)|mlp\.[02])"
    r"|single_blocks\.(?:\d|[12]\d|3[0-7])\.(linear[12]|modulation\.lin))|clip_l\..*"
)
KOHYA_SUFFIX = re.compile(r"\.(lora_(down|up)\.weight|alpha)$")
LYCORIS_SUFFIX = re.compile(  # kinds of adapter beside LoRA that ComfyUI applies
    r"\.(lokr_[wt][12](_[ab])?|hada_[wt][12](_[ab])?|dora_scale|diff|diff_b|[ab][12]\.weight|oft_blocks|rescale|alpha)$"
)
PEFT_SUFFIX = re.compile(r"\.lora_[AB]\.weight$")


@dataclass(frozen=True)
class Verdict:
    """Loaders that use every key, and for the others the keys that they would drop or refuse."""

    loads_in: tuple[str, ...]
    lost: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """One line."""
        parts = [f"loads in {', '.join(self.loads_in)}"] if self.loads_in else ["loads nowhere that is known"]
        parts += [f"{loader} would lose {len(keys)} of its tensors ({keys[0]}, ...)" for loader, keys in self.lost.items()]
        return "; ".join(parts)

    def as_record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"loads_in": list(self.loads_in), "lost": {name: list(keys) for name, keys in self.lost.items()}, "text": self.text}


def verdict(path: Path) -> Verdict:
    """Read the file's header and judge its keys. Raises ModelFileError if it cannot be read."""
    return verdict_of(read_model_header(path).tensors)


def verdict_of(keys: Iterable[str]) -> Verdict:
    """Judge keys."""
    keys = list(keys)
    lost = {loader: tuple(key for key in keys if not takes(key)) for loader, takes in LOADERS.items()}
    loads = tuple(loader for loader, keys_lost in lost.items() if keys and not keys_lost)
    return Verdict(loads, {loader: dropped for loader, dropped in lost.items() if dropped})


def _name(key: str) -> str:
    named = split_name(key)
    return named[0] if named else ""


def _adapted(key: str) -> str:
    """The layer's name also for keys of other kinds of adapter."""
    return _name(key) or (LYCORIS_SUFFIX.sub("", key) if LYCORIS_SUFFIX.search(key) else "")


def sd_scripts(key: str) -> bool:
    """sd-scripts reads its own names only."""
    name = _name(key)
    place = kohya.place_of(name) if name.startswith(("lora_unet_", "lora_te1_text_model_", "lora_te3_")) else None
    return bool(place and KOHYA_SUFFIX.search(key) and SD_SCRIPTS_LAYERS.fullmatch(place.name))


def comfyui(key: str) -> bool:
    """ComfyUI's key map: every weight by its own name, by sd-scripts' and by diffusers' name; T5 as te2 or te3."""
    name = re.sub("^lycoris_", "lora_transformer_", _adapted(key))
    if name.startswith(("lora_unet_", "lora_te1_text_model_", "lora_te2_", "lora_te3_", "lora_transformer_")):
        return kohya.place_of(name) is not None
    if name.startswith("text_encoder.text_model."):
        return True
    bare = name.removeprefix("base_model.model.")
    if bare.startswith("diffusion_model."):
        return peft.BFL.bfl_layer(bare.removeprefix("diffusion_model.")) is not None
    found = MAPS["diffusers"].bfl_layer(bare.removeprefix("transformer."))
    return bare.startswith("transformer.") and found is not None


def forge(key: str) -> bool:
    """Forge's key map for FLUX: as ComfyUI's for the transformer and CLIP-L; layers of T5 are not claimed."""
    return comfyui(key) and not _name(key).startswith(("lora_te2_", "lora_te3_"))


def diffusers(key: str) -> bool:
    """diffusers' FluxPipeline: sd-scripts' names through its converter, its own names directly; only CLIP-L of the text encoders."""
    name = _name(key)
    if KOHYA_SUFFIX.search(key) and name.startswith("lora_"):
        place = kohya.place_of(name) if name.startswith(("lora_unet_", "lora_te1_text_model_")) else None
        return bool(place and DIFFUSERS_KOHYA_LAYERS.fullmatch(place.name))
    if not PEFT_SUFFIX.search(key):
        return False
    if name.startswith("text_encoder."):
        return True
    return name.startswith("transformer.") and MAPS["diffusers"].bfl_layer(name.removeprefix("transformer.")) is not None


LOADERS: dict[str, Callable[[str], bool]] = {"sd-scripts": sd_scripts, "ComfyUI": comfyui, "Forge": forge, "diffusers": diffusers}
