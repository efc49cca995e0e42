"""What a weights file turned out to be, and the words for it.

`Identity("flux1", "dit", "dev", "bfl").describe()` is "a FLUX.1 transformer, dev (double_blocks.*, single_blocks.*)".
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxsmith.io.header import TensorInfo

Infos = Mapping[str, TensorInfo]

ROLE_TITLES = {
    "dit": "a FLUX transformer",
    "clip_l": "a CLIP-L text encoder",
    "t5xxl": "a T5-XXL text encoder",
    "ae": "an autoencoder",
    "tiny_ae": "a tiny preview autoencoder",
    "controlnet": "a ControlNet",
    "ip_adapter": "an IP-Adapter",
    "image_embedder": "a Redux image embedder",
    "image_encoder": "an image encoder",
    "face_projector": "an InfiniteYou face projector",
    "lora": "an adapter (LoRA or the like)",
    "lora_encoder": "a LoRA encoder",
    "lora_fusion": "a LoRA fusion patcher",
    "value_encoder": "an AttriCtrl value encoder",
    "connector": "a Step1X-Edit connector",
    "generation_adapter": "Nexus-Gen's adapter for generation",
    "editing_adapter": "Nexus-Gen's merger for editing",
    "language_model": "a Qwen2.5-VL language model",
    "text_encoders_bundle": "a bundle of text encoders",
    "checkpoint": "an all-in-one checkpoint",
    "unknown": "no model that fluxsmith knows",
}
ROLE_NAMES = {"clip_l": "CLIP-L", "t5xxl": "T5-XXL", "ae": "the FLUX autoencoder", "dit": "a FLUX transformer", "lora": "an adapter"}
EVIDENCE = {  # what the keys of a role look like, for messages
    ("dit", "bfl"): "double_blocks.*, single_blocks.*",
    ("dit", "diffusers"): "transformer_blocks.*, single_transformer_blocks.*",
    ("dit", "diffsynth"): "blocks.*.attn.a_to_qkv",
    ("clip_l", ""): "text_model.*",
    ("t5xxl", ""): "encoder.block.*, shared.weight",
    ("ae", "ldm"): "encoder.down.*, decoder.up.*",
    ("ae", "diffusers"): "encoder.down_blocks.*, decoder.up_blocks.*",
    ("tiny_ae", ""): "encoder.layers.*, decoder.layers.*",
    ("controlnet", ""): "controlnet_blocks.*",
    ("connector", ""): "connector.*",
    ("generation_adapter", ""): "adapter.*",
    ("editing_adapter", ""): "embedding_merger.*",
    ("face_projector", ""): "latents, proj_in, layers.*",
    ("value_encoder", ""): "prefer_value_embedder.*",
    ("lora_encoder", ""): "embedder.model_dict.*",
    ("lora_fusion", ""): "model_dict.*.weight_base",
    ("ip_adapter", ""): "ip_adapter*",
    ("image_embedder", ""): "redux_up, redux_down",
    ("image_encoder", ""): "vision_model.*",
    ("language_model", ""): "visual.*, model.layers.*",
    ("lora", "kohya"): "lora_unet_*",
    ("lora", ""): "lora_down, lora_A or the like",
}


@dataclass(frozen=True)
class Identity:
    """What a file is. `problems` are findings, those in `unusable` forbid its use; `notes` are remarks."""

    family: str
    role: str
    variant: str = ""
    key_style: str = ""
    prefix: str = ""
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sizes: dict[str, Any] = field(default_factory=dict)
    unusable: tuple[str, ...] = ()
    path: Path | None = None

    @property
    def is_known(self) -> bool:
        """Is it a model that fluxsmith knows, whatever its state?"""
        return self.role != "unknown"

    def roles(self) -> dict[str, str]:
        """Roles the file can play -> prefix of their keys (several for an all-in-one checkpoint)."""
        return dict(self.sizes["roles"]) if "roles" in self.sizes else {self.role: self.prefix}

    def parts(self) -> dict[str, str]:
        """Roles that the file can play beside those of `roles`, with the prefix of their keys: Step1X-Edit's `connector` in its
        transformer's file, Nexus-Gen's adapters, the `image_encoder` of a whole CLIP."""
        return dict(self.sizes.get("parts", {}))

    def describe(self) -> str:
        """One phrase: title, variant, what its keys look like."""
        text = ROLE_TITLES.get(self.role, self.role)
        if self.role == "unknown":
            return f"{text} ({self.notes[0]})" if self.notes else text
        if self.variant:
            text += f", {self.family} {self.variant}" if self.role in ("dit", "controlnet", "checkpoint") else f", {self.variant}"
        seen = evidence(self.role, self.key_style)
        return f"{text} ({'' if seen.startswith(self.prefix) else self.prefix}{seen})" if seen else text

    def as_record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "path": str(self.path) if self.path else None,
            "family": self.family,
            "role": self.role,
            "variant": self.variant,
            "key_style": self.key_style,
            "prefix": self.prefix,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "sizes": self.sizes,
        }


def evidence(role: str, key_style: str = "") -> str:
    """Pattern of a role's keys for messages."""
    fallback = {"dit": "bfl", "ae": "ldm"}.get(role, "")
    return EVIDENCE.get((role, key_style)) or EVIDENCE.get((role, fallback), "")


def indices(infos: Iterable[str], prefix: str) -> list[int]:
    """Sorted block numbers of a stack: `double_blocks.` -> [0, 1, ...]."""
    found = {name[len(prefix) :].split(".", 1)[0] for name in infos if name.startswith(prefix)}
    return sorted(int(text) for text in found if text.isdigit())


def side(infos: Infos, name: str, axis: int) -> int | None:
    """One side of a tensor; None if it is absent or has fewer axes."""
    info = infos.get(name)
    return info.shape[axis] if info is not None and len(info.shape) > axis else None


def first_few(names: list[str], limit: int = 5) -> str:
    """`a, b, c and 7 more`."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
