"""Parts loaded when they are first asked for and freed when they are done: encoders are only in memory while they encode."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fluxsmith.config.choice import realise
from fluxsmith.config.section import PluginConfig
from fluxsmith.models.assembly import Models, TextStates
from fluxsmith.models.family.base import FamilyFacts
from fluxsmith.models.files import ModelFiles
from fluxsmith.models.fill import ByBlock
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.load import load_ae, load_clip_l, load_dit, load_t5xxl
from fluxsmith.models.text_encoders import ClipText, T5Text, Tokenizers, load_tokenizer

TEXT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Loading(NamedTuple):
    """How parts are loaded."""

    base_dtype: torch.dtype = torch.float32
    """Of the transformer."""
    dit_device: torch.device | None = None
    """Where the transformer goes, if not to the others' device."""
    after_text: Callable[[str, nn.Module], object] = lambda role, encoder: None
    """Called with each text encoder that was loaded, to quantise it."""
    by_block: Callable[[str], ByBlock | None] = lambda role: None
    """What is done to each block of the transformer (`dit`) and of T5 (`t5xxl`) as soon as it is read: quantising."""
    text_form: str = ""
    """What `after_text` makes of them: states of another form are not taken from a cache."""
    ae_dtype: torch.dtype = torch.float32
    """Of the autoencoder."""


def text_dtypes(asked: str | Mapping[str, str], roles: Iterable[str], device: torch.device) -> dict[str, torch.dtype]:
    """The type of each text encoder's weights: one for all, or one for each."""
    auto = torch.float32 if device.type == "cpu" else torch.bfloat16
    return {role: TEXT_DTYPES.get(asked if isinstance(asked, str) else asked.get(role, "auto"), auto) for role in roles}


class LazyModels:
    """The parts of one model config; `get` loads, `free` lets go."""

    def __init__(self, files: ModelFiles, config: PluginConfig, device: torch.device, how: Loading | None = None) -> None:
        self.files = files
        self.how = how or Loading()
        self.options: dict[str, Any] = config.model_dump()
        self.device = device
        self.facts: FamilyFacts = realise(config).facts()
        self.text_dtypes = text_dtypes(self.options["text_dtype"], self.facts.text_roles, device)
        self.models = Models(mask_text=self.facts.mask_text)

    def get(self, roles: Iterable[str]) -> Models:
        """Models with at least these parts loaded."""
        wanted = set(roles)
        models = self.models
        if "clip_l" in wanted and models.clip_l is None:
            models.clip_l = self._clip_l(self.device)
        if "t5xxl" in wanted and models.t5xxl is None:
            models.t5xxl = self._t5xxl(self.device)
        if wanted & {"clip_l", "t5xxl"}:
            models.tokenizers = self.tokenizers()
        if "ae" in wanted and models.ae is None:
            models.ae = load_ae(self.files.path("ae"), device=self.device, dtype=self.how.ae_dtype)
        if "dit" in wanted and models.dit is None:
            models.dit = self._dit(self.how.dit_device or self.device)
        return models

    def _clip_l(self, device: torch.device) -> ClipText:
        made = load_clip_l(self.files.path("clip_l"), device=device, dtype=self.text_dtypes["clip_l"])
        self.how.after_text("clip_l", made)
        return made

    def _t5xxl(self, device: torch.device) -> T5Text:
        blockwise, dtype = self.how.by_block("t5xxl"), self.text_dtypes["t5xxl"]
        made = load_t5xxl(self.files.path("t5xxl"), device=device, dtype=dtype, by_block=blockwise)
        self.how.after_text("t5xxl", made)
        return made

    def _dit(self, device: torch.device) -> FluxDiT:
        axes, blockwise = self.options["axes_dim"], self.how.by_block("dit")
        return load_dit(self.files.path("dit"), device=device, dtype=self.how.base_dtype, axes_dim=axes, by_block=blockwise)

    @torch.no_grad()
    def refill(self, role: str, module: nn.Module, device: torch.device | None = None) -> None:
        """Give a part whose weights were let go the tensors of its file again, on this device; adapters on it stay.

        Raises ValueError if the part is another one than the file makes (quantised or merged after it was loaded).
        """
        place = device or self.device
        makers: dict[str, Callable[[torch.device], nn.Module]] = {
            "dit": self._dit, "clip_l": self._clip_l, "t5xxl": self._t5xxl,
            "ae": lambda at: load_ae(self.files.path("ae"), device=at, dtype=self.how.ae_dtype),
        }  # fmt: skip
        fresh = makers[role](place)
        own = dict(module.named_modules())
        for name, theirs in fresh.named_modules():
            if name.endswith(".adapters"):
                continue
            owner = own.get(name)
            if type(owner) is not type(theirs):
                raise ValueError(f"the {role} was changed after it was loaded, so its file does not hold its weights: {name}")
            for key, tensor in [*theirs.named_parameters(recurse=False), *theirs.named_buffers(recurse=False)]:
                setattr(owner, key, tensor.requires_grad_(False) if isinstance(tensor, nn.Parameter) else tensor)

    def free(self, *, keep: Iterable[str] = ()) -> None:
        """Let go of all parts but these."""
        kept = set(keep)
        models = self.models
        models.clip_l = models.clip_l if "clip_l" in kept else None
        models.t5xxl = models.t5xxl if "t5xxl" in kept else None
        models.ae = models.ae if "ae" in kept else None
        models.dit = models.dit if "dit" in kept else None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def tokenizers(self) -> Tokenizers:
        """Both tokenizers, loaded once."""
        if self.models.tokenizers is None:
            clip = load_tokenizer(self.files.tokenizer("clip_l")) if "clip_l" in self.facts.text_roles else None
            t5 = load_tokenizer(self.files.tokenizer("t5xxl"))
            self.models.tokenizers = Tokenizers(clip, t5, clip_length=77, t5_length=self.facts.t5_length)
        return self.models.tokenizers

    def token_counts(self, prompt: str) -> dict[str, tuple[int, int]]:
        """Tokens of a prompt and the limit, per encoder."""
        return self.tokenizers().counts(prompt)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> latents (B, 16, h, w) on the host."""
        ae = self.get(("ae",)).ae
        if ae is None:
            raise ValueError("the autoencoder is not loaded")
        return ae.encode(pixels.to(self.device)).float().cpu()

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> TextStates:
        """Prompts -> text states on the host, in the encoders' type."""
        return self.get(self.facts.text_roles).encode_text(prompts).to("cpu")

    def latents_digest(self) -> str:
        """Changes when the autoencoder does."""
        return self.files.digests(("ae",))["ae"]

    def text_digest(self) -> str:
        """Changes when an encoder, its type, the length or the mask rule does."""
        facts = self.facts
        parts = [
            *self.files.digests(facts.text_roles).values(),
            *(self.text_dtypes[role] for role in facts.text_roles),
            facts.t5_length,
            facts.mask_text,
            *filter(None, [self.how.text_form]),
        ]
        return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:32]
