"""Nexus-Gen V2 (ModelScope): decoders made of FLUX.1-dev behind a language model that thinks in pictures.

`model = { type = "nexus_gen", path = "edit_decoder.bin", language_model = "Nexus-GenV2", clip_l = "...", t5xxl = "...", ae = "..." }`
"""

from typing import Literal

from pydantic import PositiveInt

from fluxsmith.config.section import PluginConfig
from fluxsmith.models.family.base import FamilyFacts

PRESETS = {
    "edit": {
        "shift": "flux",
        "side": 512,
        "steps": 50,
        "guidance": 3.5,
        "cfg": 2.0,
        "defaults": {"sample.*.cfg": 2.0, "sample.*.steps": 50},
    },
    "generation": {
        "shift": "flux",
        "side": 1024,
        "steps": 50,
        "guidance": 3.5,
        "cfg": 3.0,
        "defaults": {"sample.*.cfg": 3.0, "sample.*.steps": 50},
    },
}


class Config(PluginConfig):
    """Nexus-Gen's files."""

    preset: Literal["edit", "generation"] = "edit"
    """Which decoder; sets sampling defaults."""
    path: str = ""
    """Decoder: the transformer with its adapter or merger (edit_decoder, generation_decoder)."""
    language_model: str = ""
    """The language model: folder, shards or hub id."""
    language_tokenizer: str = ""
    """Folder of its tokenizer, when it is not beside the weights."""
    clip_l: str = ""
    """CLIP-L text encoder."""
    t5xxl: str = ""
    """T5-XXL text encoder, for the negative prompt."""
    ae: str = ""
    """Autoencoder (FLUX's)."""
    tokenizer: str = ""
    """Folder of the CLIP tokenizer, when it is not beside the encoder."""
    tokenizer_2: str = ""
    """Folder of the T5 tokenizer, when it is not beside the encoder."""
    t5_length: PositiveInt | None = None
    """T5 tokens; by default 512."""
    text_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the weights of text encoders and language model; auto is fp32 on the CPU and bf16 on a card."""
    axes_dim: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """Rotary axes, for models whose head size follows no known rule."""

    def facts(self) -> FamilyFacts:
        """FLUX.1's, and the control that it always has."""
        control = {
            "type": "nexus_gen",
            "path": self.language_model,
            "decoder": self.path,
            "tokenizer": self.language_tokenizer,
            "dtype": self.text_dtype,
        }
        return FamilyFacts("nexus_gen", self.preset, ("clip_l", "t5xxl"), self.t5_length or 512, mask_text=False, implies=control)

    def sampling_defaults(self) -> dict[str, float | str]:
        """Steps, embedded guidance, true guidance, shift and side of a picture (pixels) of the preset."""
        preset = PRESETS[self.preset]
        return {key: preset[key] for key in ("steps", "guidance", "cfg", "shift", "side")}  # type: ignore[misc]  # the table's other values are no defaults
