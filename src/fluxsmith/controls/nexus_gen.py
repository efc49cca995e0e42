"""Nexus-Gen: a language model thinks of the picture, the transformer draws it. `[[control]] type = "nexus_gen" image = "cat.png"`.

Its model section (type "nexus_gen") gives the files. The decoder decides: one draws from the prompt alone, the other changes a picture.
The negative prompt is read by CLIP and T5, as in FLUX.1.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from fluxsmith.config.control import ControlConfig, Ground, Picture
from fluxsmith.controls.base import TEXT, Prepared, Scene, Site, Unchanged
from fluxsmith.controls.base import Control as Base
from fluxsmith.controls.nexus_gen_model import Adapter, Merger, editing_ids, load_adapter, load_merger
from fluxsmith.controls.nexus_gen_states import wish
from fluxsmith.controls.pictures import opened, unreadable
from fluxsmith.controls.text_rows import with_text
from fluxsmith.errors import FluxsmithError, Problem
from fluxsmith.io.identify import identify
from fluxsmith.io.sources import resolve
from fluxsmith.models.qwen_input import QwenText
from fluxsmith.models.qwen_vl import QwenVL, find_qwen_tokenizer, load_qwen, load_qwen_text
from fluxsmith.models.stream import Conditioner, Tokens, Window

FEATURES = 64
CELL = 8  # pixels of a latent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Config(ControlConfig):
    """The picture that is changed, if one is; the model section gives the files."""

    path: str = ""
    """Nexus-Gen's language model: folder, shards or hub id; by default model.language_model."""
    decoder: str = ""
    """File with the adapter (drawing) or merger (editing): the transformer's; by default model.path."""
    tokenizer: str = ""
    """Folder of the language model's tokenizer, when it is not beside the weights."""
    image: Picture | None = None
    """Picture that the prompt is about, for the editing decoder."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the language model's weights; auto is that of the transformer."""
    heads: PositiveInt | None = None
    """Attention heads of the merger; by default heads of 128."""

    def misfits(self, ground: Ground) -> Iterator[Problem]:
        """It needs a decoder and a language model, and a transformer that takes plain latents."""
        if ground.in_channels != FEATURES or "t5xxl" not in ground.roles:
            why = f"this one takes {ground.in_channels} features a token" if ground.in_channels != FEATURES else "this one has no T5"
            yield Problem("nexus_gen needs a transformer of Nexus-Gen's decoders", why=why, fix="use them, or remove the control")
        if not self.path:
            yield Problem(
                "Nexus-Gen needs its language model", fix="set model.language_model to the folder of DiffSynth-Studio/Nexus-GenV2"
            )
        if not self.decoder:
            yield Problem("Nexus-Gen needs a decoder", fix="set control.decoder to edit_decoder or generation_decoder")
        elif isinstance(found := self._kind(), Problem):
            yield found

    def problems(self, ground: Ground) -> Iterator[Problem]:
        """The editing decoder needs a picture, the other takes none."""
        edits, who = self._kind() == "editing_adapter", f"control {self.name or self.type}"
        if edits and self.image is None:
            yield Problem(f"{who} has no picture to change", fix="give it an image, or use the generation decoder")
        if not edits and self.image is not None:
            yield Problem(f"{who} was given a picture", why="its decoder draws from the prompt alone", fix="use the editing decoder")
        yield from unreadable([self.image])

    def build(self, site: Site) -> "Control":
        """Language model and adapter or merger. Raises ModelFileError for wrong files."""
        model, decoder = resolve(self.path, "language_model"), resolve(self.decoder, "dit")
        text = load_qwen_text(find_qwen_tokenizer(model, self.tokenizer))
        place, kind = site.device, DTYPES.get(self.dtype, site.dtype)
        net = site.once(("language_model", model), lambda: load_qwen(model, device=place, dtype=kind))
        bridge: Adapter | Merger
        if self._kind() == "editing_adapter":
            bridge = site.once(("merger", decoder), lambda: load_merger(decoder, device=place, dtype=site.dtype, heads=self.heads))
        else:
            bridge = site.once(("adapter", decoder), lambda: load_adapter(decoder, device=place, dtype=site.dtype))
        return Control(net, bridge, text, self)

    def _kind(self) -> "str | Problem":
        """`editing_adapter` or `generation_adapter`, told by the decoder's header."""
        try:
            found = identify(resolve(self.decoder, "dit"))
        except FluxsmithError as error:
            return error.problems[0]
        roles = found.roles() | found.parts()
        kind = next((role for role in ("editing_adapter", "generation_adapter") if role in roles), None)
        return kind or Problem(
            f"this is {found.describe()}, a decoder of Nexus-Gen was expected", where=self.decoder, fix="give edit_decoder"
        )


class Control(Base):
    """The loaded language model, and the adapter or merger."""

    role = "nexus_gen"
    loads = ("path", "decoder", "tokenizer", "dtype", "heads")

    def __init__(self, model: QwenVL, bridge: Adapter | Merger, text: QwenText, config: Config) -> None:
        super().__init__(config, (model, bridge), denoising=())
        self.model, self.bridge, self.text = model, bridge, text

    def prepare(self, scene: Scene) -> Prepared:
        """Asks the language model; the negative branch keeps its own text."""
        image = None if self.config.image is None else opened(self.config.image)
        scene.work(self.model)
        found = wish(scene.prompt, image, self.model, self.text)
        scene.work(self.bridge)
        target, ids = found.target.to(scene.device, scene.dtype), None
        if isinstance(self.bridge, Merger) and found.reference_grid is not None:
            grids = (found.target_grid, found.reference_grid)
            rows = self.bridge(target, found.reference.to(target), grids)
            cell = CELL if scene.models.ae is None else scene.models.ae.reduction
            ids = editing_ids(grids, (scene.height // cell, scene.width // cell)).to(scene.device)
        else:
            rows = self.bridge(target)
        return Prepared(Thought(rows, ids), Unchanged())


class Thought(Unchanged):
    """The whole text of the positive branch: rows (1, S, D_txt), and ids (1, S, 3) where they belong to places of the picture."""

    order = TEXT - 1  # other rows come behind these

    def __init__(self, rows: Tensor, ids: Tensor | None = None) -> None:
        self.rows, self.ids = rows, ids

    def tokens(self, tokens: Tokens) -> Tokens:
        """As Conditioner.tokens; the pooled state stays that of the prompt."""
        return with_text(tokens, self.rows, self.ids)

    def tile(self, window: Window) -> Conditioner:
        """The same rows, their places counted from the window's corner."""
        if self.ids is None:
            return self
        return Thought(self.rows, self.ids - self.ids.new_tensor([0, window.top / 2, window.left / 2]))
