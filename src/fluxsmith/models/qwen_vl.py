"""Qwen2.5-VL, whose states Step1X-Edit and Nexus-Gen draw from: the library's model behind files of the old and the new layout.

`model = load_qwen(folder); states = model(inputs)`. Sizes are read from tensors; a config.json beside them says the rest, else the
published 7B model's numbers hold. Of Nexus-Gen's file, the head for picture tokens and the learned inputs are kept too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from fluxsmith.errors import ModelFileError
from fluxsmith.io.tokenizer_files import NAMES
from fluxsmith.models.fill import check_keys, fill, finish, meta, shapes_of
from fluxsmith.models.load import opened
from fluxsmith.models.qwen_input import MERGE, PATCH, TEMPORAL, QwenInput, QwenText, positions
from fluxsmith.models.text_encoders import load_tokenizer

HEAD, VISION_HEAD = 128, 80  # features of a head, where no config says otherwise
LAYOUTS = (("model.", "language_model."), ("visual.", "visual."))  # of the published files -> in memory
UNUSED = "lm_head.weight"  # picks words; nothing here writes text
Shapes = Mapping[str, Sequence[int]]


def memory_key(file_key: str) -> str:
    """A published name -> the library's: `model.layers.0...` is `model.language_model.layers.0...`."""
    for prefix, name in LAYOUTS:
        if file_key.startswith(prefix):
            return f"model.{name}{file_key.removeprefix(prefix)}"
    return file_key


@dataclass(frozen=True)
class QwenParams:
    """Sizes of the language model and of what sees the pictures."""

    vocab: int
    hidden: int
    mlp_hidden: int
    layers: int
    heads: int
    kv_heads: int
    sections: tuple[int, ...]
    vision_hidden: int
    vision_mlp: int
    vision_layers: int
    vision_heads: int
    whole_layers: tuple[int, ...]  # of the vision part, that see the whole picture; the others see windows of 112 pixels
    theta: float = 1e6
    eps: float = 1e-6
    prefill: int = 0  # learned inputs of Nexus-Gen

    @classmethod
    def from_shapes(cls, shapes: Shapes, config: Mapping[str, Any] | None = None) -> "QwenParams":
        """From shapes in memory names and a config.json. Raises ModelFileError where a key that carries a size is missing."""
        given = {**(config or {}), **(config or {}).get("text_config", {})}
        vision = given.get("vision_config", {})
        rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
        text, seen = "model.language_model.", "model.visual."
        try:
            vocab, hidden = shapes[f"{text}embed_tokens.weight"]
            wide = shapes[f"{text}layers.0.mlp.gate_proj.weight"][0]
            kv = shapes[f"{text}layers.0.self_attn.k_proj.weight"][0]
            vision_wide = shapes[f"{seen}blocks.0.mlp.gate_proj.weight"][0]
            vision_hidden = shapes[f"{seen}patch_embed.proj.weight"][0]
        except KeyError as missing:
            raise ModelFileError(f"the language model's size cannot be read: {missing} is missing", fix="get all of its files") from None
        layers, depth = _count(shapes, f"{text}layers."), _count(shapes, f"{seen}blocks.")
        heads = int(given.get("num_attention_heads") or hidden // HEAD)
        head = hidden // heads
        quarter = head // 8
        return cls(
            vocab, hidden, wide, layers, heads, kv // head,
            tuple(rope.get("mrope_section") or (quarter, (head // 2 - quarter) // 2, head // 2 - quarter - (head // 2 - quarter) // 2)),
            vision_hidden, vision_wide, depth, int(vision.get("num_heads") or vision_hidden // VISION_HEAD),
            tuple(vision.get("fullatt_block_indexes") or (depth // 4 * part - 1 for part in (1, 2, 3, 4) if depth >= 4)),
            float(rope.get("rope_theta") or given.get("rope_theta") or 1e6), float(given.get("rms_norm_eps") or 1e-6),
            shapes["image_prefill_embeds.weight"][0] if "image_prefill_embeds.weight" in shapes else 0,
        )  # fmt: skip


def _count(shapes: Shapes, prefix: str) -> int:
    return 1 + max((int(key[len(prefix) :].split(".")[0]) for key in shapes if key.startswith(prefix)), default=-1)


class QwenVL(nn.Module):
    """Conversations with pictures -> states."""

    def __init__(self, params: QwenParams) -> None:
        super().__init__()
        self.params = params
        self.model = Qwen2_5_VLModel(_library_config(params))
        if params.prefill:
            self.vision_head = nn.Linear(params.hidden, params.hidden, bias=False)
            self.image_prefill_embeds = nn.Embedding(params.prefill, params.hidden)

    def with_tables(self) -> "QwenVL":
        """Rotary tables are no weights: made anew after building on the meta device."""
        visual, language = self.model.visual, self.model.language_model
        visual.rotary_pos_emb = type(visual.rotary_pos_emb)(visual.rotary_pos_emb.config)
        language.rotary_emb = type(language.rotary_emb)(language.rotary_emb.config)
        return self

    def see(self, inputs: QwenInput) -> Tensor:
        """Tokens of all pictures, (sum of them, D)."""
        weight = next(self.model.visual.parameters())
        grids = torch.tensor([(1, *grid) for grid in inputs.grids], device=weight.device)
        return self.model.visual(inputs.patches.to(weight), grid_thw=grids).pooler_output

    def embedded(self, inputs: QwenInput, is_image: Tensor, pictures: Tensor) -> Tensor:
        """Text and pictures in their places, (1, T, D)."""
        rows = self.model.language_model.embed_tokens(inputs.ids.to(pictures.device))
        return rows.masked_scatter(is_image[..., None].expand_as(rows), pictures.to(rows.dtype))

    def states(self, rows: Tensor, places: Tensor) -> Tensor:
        """Inputs (1, T, D) at rotary positions (3, 1, T) -> states after the last norm, (1, T, D)."""
        return self.model.language_model(inputs_embeds=rows, position_ids=places, use_cache=False).last_hidden_state

    def forward(self, inputs: QwenInput, image_id: int) -> Tensor:
        """States (1, T, D) of a conversation."""
        pictures = self.see(inputs)
        is_image = (inputs.ids == image_id).to(pictures.device)
        return self.states(self.embedded(inputs, is_image, pictures), positions(is_image, inputs.grids))


def _library_config(params: QwenParams) -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "rope_theta": params.theta, "mrope_section": list(params.sections)}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": params.vocab, "hidden_size": params.hidden, "intermediate_size": params.mlp_hidden,
            "num_hidden_layers": params.layers, "num_attention_heads": params.heads, "num_key_value_heads": params.kv_heads,
            "rms_norm_eps": params.eps, "rope_parameters": rope, "use_cache": False,
            "bos_token_id": None, "eos_token_id": None,
        },
        vision_config={
            "depth": params.vision_layers, "hidden_size": params.vision_hidden, "intermediate_size": params.vision_mlp,
            "num_heads": params.vision_heads, "out_hidden_size": params.hidden, "patch_size": PATCH, "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL, "fullatt_block_indexes": list(params.whole_layers),
        },
    )  # fmt: skip


def load_qwen(path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> QwenVL:
    """Read one file, shards or a folder, frozen and in eval mode. Raises ModelFileError for a wrong, incomplete or broken one."""
    with opened(path, "language_model") as file:
        sources = {memory_key(key): source for key, source in file.tensors.items() if key != UNUSED}
        shapes = {key: source.shape for key, source in sources.items()}
        params = QwenParams.from_shapes(shapes, beside(path))
        net = meta(lambda: QwenVL(params))
        check_keys(shapes_of(net), shapes, file.where)
        fill(net, {key: source.read for key, source in sources.items()}, device=device, dtype=dtype)
        finish(net.with_tables())
    return net.requires_grad_(False).to(device)


def beside(path: Path | str) -> dict[str, Any]:
    """The config.json beside the weights, or nothing. Raises ModelFileError if it cannot be read."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFileError("config.json cannot be read", where=str(file), why=str(error), fix="copy it again, or remove it") from error
    return made if isinstance(made, dict) else {}


def find_qwen_tokenizer(path: Path | str, configured: str = "") -> Path:
    """The tokenizer's folder: the configured one, the model's own, or `tokenizer` in or beside it. Raises ModelFileError."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    looked = [Path(configured).expanduser()] if configured else [folder, folder / "tokenizer", folder.parent / "tokenizer"]
    for place in looked:
        if any((place / name).is_file() for name in NAMES):
            return place
    shown = ", ".join(map(str, looked))
    raise ModelFileError("no tokenizer for the language model", why=f"looked in {shown}", fix="copy the tokenizer files beside the weights")


def load_qwen_text(folder: Path) -> QwenText:
    """The tokenizer of a folder. Raises ModelFileError for one that cannot be read or knows no pictures."""
    return QwenText(load_tokenizer(folder), str(folder))
