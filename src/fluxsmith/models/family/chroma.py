"""Chroma (lodestones): FLUX without modulation layers and without CLIP; a small network computes all modulations.

`model = { type = "chroma", path = "chroma.safetensors", t5xxl = "...", ae = "..." }`. Guidance is true classifier-free guidance.
"""

from typing import Literal

from pydantic import PositiveInt

from fluxsmith.config.section import PluginConfig
from fluxsmith.models.family.base import FamilyFacts

PRESETS = {
    "hd": {
        "t5_length": 512,
        "shift": "flux",
        "side": 1024,
        "steps": 26,
        "guidance": 0.0,
        "cfg": 4.0,
        "defaults": {
            "noise.guidance": 0.0,
            "noise.sampling": "sigmoid",
            "sample.*.guidance": 0.0,
            "sample.*.cfg": 4.0,
            "sample.*.steps": 26,
        },
    }
}


class Config(PluginConfig):
    """Chroma's files."""

    preset: Literal["hd"] = "hd"
    """Which member of the family."""
    path: str = ""
    """Transformer: file, shards, folder, or hub id."""
    t5xxl: str = ""
    """T5-XXL text encoder."""
    ae: str = ""
    """Autoencoder (FLUX's)."""
    tokenizer_2: str = ""
    """Folder of the T5 tokenizer, when it is not beside the encoder."""
    t5_length: PositiveInt | None = None
    """T5 tokens; by default 512."""
    text_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the text encoder's weights; auto is fp32 on the CPU and bf16 on a card."""
    axes_dim: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """Rotary axes, for models whose head size follows no known rule."""

    def facts(self) -> FamilyFacts:
        """Chroma always hides padding, but for one token after the text."""
        return FamilyFacts("chroma", "chroma", ("t5xxl",), self.t5_length or 512, mask_text=True)

    def sampling_defaults(self) -> dict[str, float | str]:
        """Steps, embedded guidance, shift and side of a picture (pixels)."""
        preset = PRESETS[self.preset]
        return {key: preset[key] for key in ("steps", "guidance", "cfg", "shift", "side")}  # type: ignore[misc]  # the table's other values are no defaults
