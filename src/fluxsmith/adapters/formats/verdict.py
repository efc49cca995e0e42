"""Where an adapter file loads: the key grammar of each loader, applied to the keys of the file. Headers only.

`verdict(path).text` is "loads in sd-scripts, ComfyUI, Forge, diffusers" or names what a loader drops. Grammars as of
sd-scripts 48d368fa, ComfyUI 2026, diffusers 0.42.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxsmith.adapters.formats import bfl_control, comfy, xlabs
from fluxsmith.adapters.formats.naming import BFL, DIFFUSERS, place_of
from fluxsmith.adapters.formats.suffixes import split
from fluxsmith.io.shards import read_model_header

BLOCK_LAYERS = r"double_blocks\.\d+\.(img|txt)_(mod\.lin|attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.(linear[12]|modulation\.lin)"
SD_SCRIPTS_LAYERS = re.compile(  # networks/lora_flux.py: block layers, and the embedders that in_dims can name
    rf"dit\.({BLOCK_LAYERS}|img_in|txt_in|(time_in|vector_in|guidance_in)\.(in|out)_layer)|clip_l\..*|t5xxl\..*"
)
SD_SCRIPTS_OFT = re.compile(rf"dit\.({BLOCK_LAYERS})")  # networks/oft_flux.py
DIFFUSERS_KOHYA_LAYERS = re.compile(  # embedders and the final layer are converted without their prefix and then dropped
    r"dit\.(double_blocks\.(?:\d|1[0-8])\.(img|txt)_(mod\.lin|attn\.(qkv|proj)|mlp\.[02])"
    r"|single_blocks\.(?:\d|[12]\d|3[0-7])\.(linear[12]|modulation\.lin))|clip_l\..*"
)
KOHYA_SUFFIX = re.compile(r"\.(lora_(down|up)\.weight|alpha)$")
KOHYA_OFT = re.compile(r"oft_unet_.*\.(oft_blocks\.\d+|alpha)$")
PEFT_SUFFIX = re.compile(r"\.(lora_[AB]\.(weight|bias)|lora_magnitude_vector)$")
FOREIGN_TO_COMFY = re.compile(r"\.(on_input|weight|lora_magnitude_vector(\.\w+)*|oft_blocks\.\d+)$")
LORA_WEIGHT = re.compile(r"\.(lora_(down|up|A|B)(\.[\w-]+)?|lora\.(down|up)|[ab][12])\.weight$")
COMFY_TEXT = tuple(prefix for role, prefix in comfy.PREFIXES.items() if role != "dit")


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
    ending = split(key)
    return ending.name if ending else ""


def sd_scripts(key: str) -> bool:
    """sd-scripts reads its own names only: LoRA, and OFT with `--network_module networks.oft_flux`."""
    name = _name(key)
    place = place_of(name) if name.startswith(("lora_unet_", "lora_te1_text_model_", "lora_te3_", "oft_unet_")) else None
    if place and KOHYA_OFT.match(key):
        return bool(SD_SCRIPTS_OFT.fullmatch(place.name))
    return bool(place and name.startswith("lora_") and KOHYA_SUFFIX.search(key) and SD_SCRIPTS_LAYERS.fullmatch(place.name))


def comfyui(key: str) -> bool:
    """ComfyUI's key map: every weight by its own name, by sd-scripts' and by diffusers' name; T5 as te2 or te3. Not (IA)3."""
    if bfl_control.SCALE.match(key):
        return True
    if FOREIGN_TO_COMFY.search(key) and not LORA_WEIGHT.search(key):
        return False
    name = re.sub("^lycoris_", "lora_transformer_", _name(key))
    if key.endswith(".lora_B.bias"):
        return BFL.bfl_layer(name) is not None  # in files of BFL's control LoRAs alone
    if name.startswith(("lora_unet_", "lora_te1_text_model_", "lora_te2_", "lora_te3_", "lora_transformer_")):
        return place_of(name) is not None
    if name.startswith(("text_encoder.text_model.", *COMFY_TEXT)):
        return True
    bare = name.removeprefix("base_model.model.")
    if bare.startswith("diffusion_model."):
        return BFL.bfl_layer(bare.removeprefix("diffusion_model.")) is not None
    if bare.startswith("transformer."):
        return DIFFUSERS.bfl_layer(bare.removeprefix("transformer.")) is not None
    return bool(re.search(r"\.lora_[AB]\.weight$", key)) and name == bare and BFL.bfl_layer(bare) is not None


def forge(key: str) -> bool:
    """Forge's key map for FLUX: as ComfyUI's for the transformer and CLIP-L; layers of T5 and control LoRAs are not claimed."""
    name = _name(key)
    if name.startswith(("lora_te2_", "lora_te3_", *COMFY_TEXT)) or bfl_control.SCALE.match(key) or BFL.bfl_layer(name):
        return False
    return comfyui(key)


def diffusers(key: str) -> bool:
    """diffusers' FluxPipeline: its own names directly; sd-scripts', ComfyUI's, XLabs' and BFL control names through converters.

    Only CLIP-L of the text encoders; of other kinds than LoRA only DoRA in PEFT's words (`dora_scale` is dropped with a warning).
    """
    name = _name(key)
    if xlabs.NAME.match(key) or bfl_control.SCALE.match(key):
        return True
    if KOHYA_SUFFIX.search(key) and name.startswith("lora_"):
        place = place_of(name) if name.startswith(("lora_unet_", "lora_te1_text_model_")) else None
        return bool(place and DIFFUSERS_KOHYA_LAYERS.fullmatch(place.name))
    if KOHYA_SUFFIX.search(key) and name.startswith("diffusion_model."):
        place = BFL.bfl_layer(name.removeprefix("diffusion_model."))
        return bool(place and DIFFUSERS_KOHYA_LAYERS.fullmatch(f"dit.{place.name}"))
    if not PEFT_SUFFIX.search(key):
        return False
    if name.startswith("text_encoder."):
        return True
    known = DIFFUSERS.bfl_layer(name.removeprefix("transformer.")) if name.startswith("transformer.") else BFL.bfl_layer(name)
    return known is not None


LOADERS: dict[str, Callable[[str], bool]] = {"sd-scripts": sd_scripts, "ComfyUI": comfyui, "Forge": forge, "diffusers": diffusers}
