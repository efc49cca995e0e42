"""Step1X-Edit (StepFun): FLUX's blocks behind a language model, for changing a picture as the prompt says.

`model = { type = "step1x", path = "step1x-edit-i1258.safetensors", qwen = "Qwen/Qwen2.5-VL-7B-Instruct", ae = "vae.safetensors" }`
"""

from typing import Literal

from pydantic import PositiveInt

from fluxsmith.config.section import PluginConfig
from fluxsmith.models.family.base import FamilyFacts

PRESETS = {
    "edit": {
        "shift": "flux",
        "side": 1024,
        "steps": 30,
        "guidance": 0.0,
        "cfg": 6.0,
        "defaults": {"noise.guidance": 0.0, "sample.*.guidance": 0.0, "sample.*.cfg": 6.0, "sample.*.steps": 30},
    }
}


class Config(PluginConfig):
    """Step1X-Edit's files."""

    preset: Literal["edit"] = "edit"
    """Which member of the family."""
    path: str = ""
    """Transformer with its connector: file, folder, or hub id."""
    qwen: str = ""
    """Qwen2.5-VL-7B-Instruct: folder, shards or hub id."""
    qwen_tokenizer: str = ""
    """Folder of its tokenizer, when it is not beside the weights."""
    ae: str = ""
    """Autoencoder (FLUX's)."""
    text_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the language model's weights; auto is that of the transformer."""
    axes_dim: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """Rotary axes, for models whose head size follows no known rule."""

    def facts(self) -> FamilyFacts:
        """No text encoders: the control that it always has brings the text."""
        control = {"type": "step1x", "path": self.path, "qwen": self.qwen, "tokenizer": self.qwen_tokenizer, "dtype": self.text_dtype}
        return FamilyFacts("step1x", self.preset, (), 0, mask_text=False, implies=control)

    def sampling_defaults(self) -> dict[str, float | str]:
        """Steps, embedded guidance, true guidance, shift and side of a picture (pixels)."""
        preset = PRESETS[self.preset]
        return {key: preset[key] for key in ("steps", "guidance", "cfg", "shift", "side")}  # type: ignore[misc]  # the table's other values are no defaults
