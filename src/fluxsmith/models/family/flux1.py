"""FLUX.1 and the models that share its structure: which files, which guidance, which shift.

`model = { type = "flux1", preset = "dev", path = "flux1-dev.safetensors", clip_l = "...", t5xxl = "...", ae = "..." }`
"""

from typing import Literal

from pydantic import PositiveInt

from fluxsmith.config.section import PluginConfig
from fluxsmith.models.family.base import FamilyFacts

PRESETS = {
    "dev": {"t5_length": 512, "shift": "flux", "side": 1024, "steps": 28, "guidance": 3.5, "defaults": {}},
    "schnell": {
        "t5_length": 256,
        "shift": "none",
        "side": 1024,
        "steps": 4,
        "guidance": 0.0,
        "defaults": {"sample.*.steps": 4, "sample.*.guidance": 0.0},
    },
    "krea": {"t5_length": 512, "shift": "flux", "side": 1024, "steps": 28, "guidance": 4.5, "defaults": {"sample.*.guidance": 4.5}},
    "kontext": {"t5_length": 512, "shift": "flux", "side": 1024, "steps": 28, "guidance": 2.5, "defaults": {"sample.*.guidance": 2.5}},
    "fill": {"t5_length": 512, "shift": "flux", "side": 1024, "steps": 50, "guidance": 30.0, "defaults": {"sample.*.guidance": 30.0}},
    "canny": {"t5_length": 512, "shift": "flux", "side": 1024, "steps": 50, "guidance": 30.0, "defaults": {"sample.*.guidance": 30.0}},
    "depth": {"t5_length": 512, "shift": "flux", "side": 1024, "steps": 50, "guidance": 10.0, "defaults": {"sample.*.guidance": 10.0}},
    "flex2": {"t5_length": 512, "shift": "flux", "side": 1024, "steps": 50, "guidance": 3.5, "defaults": {}},
    "flux-shapes": {
        "t5_length": 24,
        "shift": "none",
        "side": 64,
        "steps": 12,
        "guidance": 2.5,
        "files": "bundle:flux-shapes",
        "defaults": {
            "noise.sampling": "sigmoid",
            "data.*.resolution": 64,
            "sample.*.width": 64,
            "sample.*.height": 64,
            "sample.*.steps": 12,
            "sample.*.guidance": 2.5,
        },
    },
}


class Config(PluginConfig):
    """FLUX.1 files. A folder in `path` (diffusers layout, or ComfyUI's models folder) gives all of them."""

    preset: Literal["dev", "schnell", "krea", "kontext", "fill", "canny", "depth", "flex2", "flux-shapes"] = "dev"
    """Which member of the family; sets sampling defaults. flux-shapes is the bundled tiny model."""
    path: str = ""
    """Transformer: file, shards, folder, or hub id."""
    clip_l: str = ""
    """CLIP-L text encoder."""
    t5xxl: str = ""
    """T5-XXL text encoder."""
    ae: str = ""
    """Autoencoder (FLUX's, or a tiny one)."""
    tokenizer: str = ""
    """Folder of the CLIP tokenizer, when it is not beside the encoder."""
    tokenizer_2: str = ""
    """Folder of the T5 tokenizer, when it is not beside the encoder."""
    t5_length: PositiveInt | None = None
    """T5 tokens; by default 512 (dev) or 256 (schnell)."""
    mask_text: bool = False
    """Hide padding tokens of T5 in attention."""
    text_dtype: Literal["auto", "fp32", "bf16", "fp16"] | dict[Literal["clip_l", "t5xxl"], Literal["auto", "fp32", "bf16", "fp16"]] = "auto"
    """Type of the text encoders' weights, or one for each, such as `{ t5xxl = "bf16", clip_l = "fp32" }`; auto is fp32 on the CPU and
    bf16 on a card."""
    axes_dim: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """Rotary axes, for models whose head size follows no known rule."""

    def facts(self) -> FamilyFacts:
        """What the loader needs to know."""
        preset = PRESETS[self.preset]
        length, bundle = self.t5_length or int(str(preset["t5_length"])), str(preset.get("files", ""))
        return FamilyFacts("flux1", self.preset, ("clip_l", "t5xxl"), length, self.mask_text, bundle)

    def sampling_defaults(self) -> dict[str, float | str]:
        """Steps, embedded guidance, shift and side of a picture (pixels) of the preset."""
        preset = PRESETS[self.preset]
        return {key: preset[key] for key in ("steps", "guidance", "shift", "side")}  # type: ignore[misc]  # the table's other values are no defaults
