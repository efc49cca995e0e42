"""The parts of one model held together, and the two things everybody asks of them: text states and a velocity.

Training, validation and inference all call `velocity`, so a control or an adapter acts the same everywhere.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fluxsmith.models.autoencoder import AutoEncoder
from fluxsmith.models.flux import FluxDiT, FluxParams
from fluxsmith.models.packing import image_ids, pack, text_ids, unpack
from fluxsmith.models.stream import BlockHook, Conditioner, Tokens
from fluxsmith.models.text_encoders import ClipText, T5Text, TokenIds, Tokenizers
from fluxsmith.models.text_states import TextStates
from fluxsmith.models.tiny_autoencoder import TinyAutoEncoder

__all__ = ["Level", "Models", "Predictor", "TextStates", "encode_ids", "joint_mask", "velocity"]


class Level(NamedTuple):
    """Where in the flow a batch is, and how strongly the embedded guidance pulls."""

    t: Tensor  # (B,) noise level in [0, 1]
    guidance: Tensor | None = None  # (B,); ignored by models without the embedder


class Control(Protocol):
    """A loaded control model, as training sees it."""

    role: str
    nets: tuple[nn.Module, ...]

    def conditioner(self, models: "Models", pixels: Tensor | None) -> Conditioner:
        """Ready for condition pictures (B, 3, H, W) in [-1, 1]."""
        ...


class Predictor(Protocol):
    """What `velocity` asks: a transformer, or one behind a step cache."""

    params: FluxParams
    visible_padding: int

    def __call__(self, tokens: Tokens, hooks: Sequence[BlockHook] = ()) -> Tensor:
        """As FluxDiT.forward."""
        ...


class Switchable(Protocol):
    """A set of adapters."""

    def disabled(self) -> AbstractContextManager[None]:
        """The base alone, for a while."""
        ...


@dataclass
class Models:
    """The loaded parts; a part that is not needed, or was freed, is None."""

    dit: FluxDiT | None = None
    ae: AutoEncoder | TinyAutoEncoder | None = None
    clip_l: ClipText | None = None
    t5xxl: T5Text | None = None
    tokenizers: Tokenizers | None = None
    controls: "tuple[Control, ...]" = ()
    adapters: "Switchable | None" = None  # those being trained: `base_alone` switches them off
    mask_text: bool = False
    is_clip_live: bool = False  # CLIP is trained beside cached T5 states, so pooled states are computed anew

    def part(self, name: str) -> nn.Module:
        """A part by its role name; raises ValueError if it is not loaded."""
        module = {"dit": self.dit, "ae": self.ae, "clip_l": self.clip_l, "t5xxl": self.t5xxl}[name]
        if module is None:
            raise ValueError(f"the {name} is not loaded")
        return module

    def loaded(self) -> dict[str, nn.Module]:
        """Role -> module for the parts that are there."""
        parts = {"dit": self.dit, "clip_l": self.clip_l, "t5xxl": self.t5xxl, "ae": self.ae}
        return {name: module for name, module in parts.items() if module is not None}

    def base_alone(self) -> AbstractContextManager[None]:
        """The models without the adapters being trained, for a while. Raises ValueError if the base itself is trained."""
        if self.adapters is None:
            raise ValueError("there is no adapter to switch off")
        return self.adapters.disabled()

    def conditioners(self, pixels: Tensor | None) -> list[Conditioner]:
        """All controls, made ready for these condition pictures."""
        return [control.conditioner(self, pixels) for control in self.controls]

    def encode_text(self, prompts: Sequence[str]) -> TextStates:
        """Prompts -> text states on the encoders' device; gradients flow where the encoders are trained."""
        if self.tokenizers is None or self.t5xxl is None:
            raise ValueError("text encoders and tokenizers must be loaded to encode prompts")
        return encode_ids(self.clip_l, self.t5xxl, self.tokenizers(prompts), mask_text=self.mask_text)

    def with_live_clip(self, text: TextStates, prompts: Sequence[str]) -> TextStates:
        """The states with the pooled part computed now (with gradient), where CLIP is trained beside cached T5 states."""
        if not self.is_clip_live or self.clip_l is None or self.tokenizers is None:
            return text
        ids = self.tokenizers.clip_ids(prompts)
        return text._replace(pooled=self.clip_l(ids.to(next(self.clip_l.parameters()).device)))


def encode_ids(clip_l: ClipText | None, t5xxl: T5Text, ids: TokenIds, *, mask_text: bool) -> TextStates:
    """Token ids -> text states. T5 sees padding unless `mask_text` (as FLUX.1 was trained). Without CLIP the pooled state is one zero."""
    t5_device = next(t5xxl.parameters()).device
    mask = ids.t5_mask.to(t5_device)
    txt = t5xxl(ids.t5.to(t5_device), mask if mask_text else None)
    if clip_l is None:
        return TextStates(txt, txt.new_zeros(txt.shape[0], 1), mask)
    pooled = clip_l(ids.clip.to(next(clip_l.parameters()).device))
    return TextStates(txt, pooled.to(t5_device), mask)


def velocity(
    dit: Predictor,
    latents: Tensor,
    text: TextStates,
    level: Level,
    *,
    mask_text: bool = False,
    controls: Sequence[Conditioner] = (),
) -> Tensor:
    """Predicted noise - clean for latents (B, 16, h, w) at a noise level, in the latents' shape. `controls` act by their order."""
    controls = sorted(controls, key=lambda control: control.order)
    tokens = model_input(dit, latents, text, level, mask_text=mask_text, controls=controls)
    hooks = [hook for control in controls for hook in control.hooks(tokens)]
    return unpack(dit(tokens, hooks), *latents.shape[-2:])


def model_input(
    dit: Predictor,
    latents: Tensor,
    text: TextStates,
    level: Level,
    *,
    mask_text: bool = False,
    controls: Sequence[Conditioner] = (),
) -> Tokens:
    """The transformer's input for latents (B, 16, h, w), with what the controls (in this order) make of it."""
    b, _, height, width = latents.shape
    device = latents.device
    img = pack(latents)
    tokens = Tokens(
        img=img.to(text.txt.dtype),
        img_ids=image_ids(b, height, width, device=device),
        txt=text.txt,
        txt_ids=text_ids(b, text.txt.shape[1], device=device),
        y=text.pooled,
        t=level.t,
        guidance=level.guidance if dit.params.guidance_embed else None,
        mask=joint_mask(visible(text.mask, dit.visible_padding), img.shape[1]) if mask_text else None,
    )
    for control in controls:
        tokens = control.tokens(tokens)
    return tokens


def visible(text_mask: Tensor, padding: int) -> Tensor:
    """The text mask (B, T) with the first `padding` padding tokens of each row shown too."""
    return text_mask | (text_mask.logical_not().cumsum(dim=1) <= padding) if padding else text_mask


def joint_mask(text_mask: Tensor, image_tokens: int) -> Tensor:
    """Key mask over [text, image]: (B, T) -> (B, 1, 1, T+N); image tokens are always seen."""
    seen = text_mask.new_ones(text_mask.shape[0], image_tokens)
    return torch.cat((text_mask, seen), dim=1)[:, None, None]
