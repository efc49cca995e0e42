"""Options every quantiser has: which layers it leaves alone or keeps in 8 bits, the text encoders, and where the work is done.

A quantiser's `Config` adds its own, and `make(weight, form)`; `fluxsmith.quant.base.quantise` does the rest.
"""

import re
from typing import Literal

from pydantic import field_validator

from fluxsmith.config.section import PluginConfig

Kind = Literal["fp8", "int8", "int4", "int2", "nf4"]
Beside = Literal["same", "int8", "keep"]
Compute = Literal["auto", "weight_only", "dynamic"]


class QuantConfig(PluginConfig):
    """What is quantised. Every Linear of the transformer's blocks is, unless an option says otherwise."""

    exclude: tuple[str, ...] = ()
    """Patterns (regular expressions searched in paths such as `dit.double_blocks.3.img_attn.qkv`) of layers that stay as they are."""
    modulation: Beside = "same"
    """Modulation layers, whose outputs scale every token: `same` as the others, `int8`, or `keep` as they are."""
    embedders: Beside = "keep"
    """Layers outside the blocks: embedders and the last layer."""
    text_encoders: bool | Kind | dict[Literal["clip_l", "t5xxl"], Kind] = False
    """The text encoders too: true for this very kind, the name of a kind, or one for each, such as `{ t5xxl = "int8" }`."""
    via: Literal["device", "cpu"] = "device"
    """Where weights are quantised while they are loaded, block by block: on the card, or on the CPU so that the card never holds more."""

    @field_validator("exclude")
    @classmethod
    def _patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return value

    def leaves_out(self, path: str) -> bool:
        """Does `exclude` name this layer?"""
        return any(re.search(pattern, path) for pattern in self.exclude)

    def kind_of_encoder(self, role: str) -> str | None:
        """The kind for `clip_l` or `t5xxl`; empty for this very kind, None for none."""
        if isinstance(self.text_encoders, dict):
            return {str(name): str(kind) for name, kind in self.text_encoders.items()}.get(role)
        if isinstance(self.text_encoders, str):
            return self.text_encoders
        return "" if self.text_encoders else None
