"""CLIP-L and T5: prompts -> pooled vector and text rows. transformers' classes with our Linear in them.

Sizes come from the tensors; file keys are mapped by a fixed rule and loaded strictly (transformers 5 dropped the
`text_model.` prefix in memory). The only file that imports transformers.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from fluxsmith.errors import ModelFileError
from fluxsmith.models.linear import adopt_linears

CLIP_ROOT = "text_model."
T5_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")  # files hold either or both; they are one tensor


@dataclass(frozen=True)
class ClipParams:
    """Sizes of a CLIP text tower; `num_heads` and `eos` cannot be read from tensors."""

    vocab: int
    hidden: int
    mlp_hidden: int
    layers: int
    positions: int
    num_heads: int
    eos: int

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]], num_heads: int | None = None, eos: int | None = None) -> "ClipParams":
        """Read sizes from file keys (with `text_model.`); heads are 64 wide and eos is the last token unless given."""
        try:
            vocab, hidden = shapes[f"{CLIP_ROOT}embeddings.token_embedding.weight"]
            positions = shapes[f"{CLIP_ROOT}embeddings.position_embedding.weight"][0]
            mlp_hidden = shapes[f"{CLIP_ROOT}encoder.layers.0.mlp.fc1.weight"][0]
        except KeyError as missing:
            raise ModelFileError(f"the CLIP tower's size cannot be read: {missing} is missing", fix="use clip_l.safetensors") from None
        layers = 1 + max(int(key.split(".")[3]) for key in shapes if key.startswith(f"{CLIP_ROOT}encoder.layers."))
        heads = num_heads or (hidden // 64 if hidden % 64 == 0 else 0)
        if not heads or hidden % heads:
            raise ModelFileError(
                f"a CLIP tower of width {hidden} has no standard number of heads",
                fix="put a config.json with num_attention_heads beside the file",
            )
        return cls(vocab, hidden, mlp_hidden, layers, positions, heads, vocab - 1 if eos is None else eos)


class ClipText(nn.Module):
    """CLIP's text tower; FLUX uses only its pooled vector."""

    def __init__(self, params: ClipParams) -> None:
        super().__init__()
        self.params = params
        config = CLIPTextConfig(
            vocab_size=params.vocab,
            hidden_size=params.hidden,
            intermediate_size=params.mlp_hidden,
            num_hidden_layers=params.layers,
            num_attention_heads=params.num_heads,
            max_position_embeddings=params.positions,
            hidden_act="quick_gelu",
            eos_token_id=params.eos,
            bos_token_id=max(params.eos - 1, 0),
        )
        self.model = CLIPTextModel(config)
        adopt_linears(self.model)

    @staticmethod
    def memory_key(file_key: str) -> str:
        """`text_model.x` in a file is `x` in transformers 5."""
        return file_key.removeprefix(CLIP_ROOT)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> pooled vector (B, D): the final-norm state at the first end-of-text token."""
        return self.pool(self.hidden_states(ids), ids)

    def hidden_states(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D), after the final norm."""
        return self.model(input_ids=ids).last_hidden_state

    def pool(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """(B, L, D) at the first end-of-text position of ids (B, L) -> (B, D)."""
        place = (ids == self.params.eos).int().argmax(dim=-1)
        return hidden[torch.arange(len(ids), device=hidden.device), place.to(hidden.device)]


@dataclass(frozen=True)
class T5Params:
    """Sizes of a T5 v1.1 encoder; all but `max_distance` are read from tensors."""

    vocab: int
    hidden: int
    head: int
    mlp_hidden: int
    layers: int
    num_heads: int
    buckets: int
    max_distance: int = 128

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> "T5Params":
        """Read sizes from file keys; raises ModelFileError where a key that carries a size is missing."""
        try:
            embedding = next(shapes[key] for key in T5_EMBEDDINGS if key in shapes)
            buckets, heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
            inner = shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0]
            mlp_hidden = shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0]
        except (KeyError, StopIteration) as missing:
            raise ModelFileError(f"the T5 encoder's size cannot be read: {missing} is missing", fix="use t5xxl_fp16.safetensors") from None
        layers = 1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("encoder.block."))
        return cls(embedding[0], embedding[1], inner // heads, mlp_hidden, layers, heads, buckets)


class T5Text(nn.Module):
    """T5's encoder; FLUX uses all its output rows, padding included."""

    def __init__(self, params: T5Params) -> None:
        super().__init__()
        self.params = params
        config = T5Config(
            vocab_size=params.vocab,
            d_model=params.hidden,
            d_kv=params.head,
            d_ff=params.mlp_hidden,
            num_layers=params.layers,
            num_heads=params.num_heads,
            relative_attention_num_buckets=params.buckets,
            relative_attention_max_distance=params.max_distance,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
        )
        self.model = T5EncoderModel(config)
        adopt_linears(self.model)

    @staticmethod
    def memory_key(file_key: str) -> str:
        """File keys are memory keys; both embedding names mean the shared one."""
        return T5_EMBEDDINGS[0] if file_key in T5_EMBEDDINGS else file_key

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Token ids (B, T) -> rows (B, T, D). `mask` (B, T) hides padding from attention; FLUX.1 was trained without."""
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


class TokenIds(NamedTuple):
    """Both encoders' ids for a list of prompts."""

    clip: Tensor  # (B, L)
    t5: Tensor  # (B, T)
    t5_mask: Tensor  # (B, T) bool, True on real tokens


class Tokenizers:
    """The two tokenizers with their lengths: CLIP is cut at its positions, T5 at `t5_length`."""

    def __init__(self, clip: PreTrainedTokenizerBase | None, t5: PreTrainedTokenizerBase, *, clip_length: int, t5_length: int) -> None:
        """`clip` is None for models without CLIP (Chroma)."""
        self.clip = clip
        self.t5 = t5
        self.clip_length = 0 if clip is None else min(clip_length, _limit(clip))
        self.t5_length = min(t5_length, _limit(t5))

    def __call__(self, prompts: Sequence[str]) -> TokenIds:
        """Ids padded to the full lengths."""
        t5 = _encode(self.t5, prompts, self.t5_length)
        return TokenIds(self.clip_ids(prompts), t5["input_ids"], t5["attention_mask"].bool())

    def clip_ids(self, prompts: Sequence[str]) -> Tensor:
        """CLIP's part alone, (B, L); no columns for models without CLIP."""
        if self.clip is None:
            return torch.zeros(len(prompts), 0, dtype=torch.long)
        return _encode(self.clip, prompts, self.clip_length)["input_ids"]

    def counts(self, prompt: str) -> dict[str, tuple[int, int]]:
        """Tokens of a prompt before cutting, and the limit, per encoder."""
        pairs = {"clip_l": (self.clip, self.clip_length), "t5xxl": (self.t5, self.t5_length)}
        there = {name: (tokenizer, limit) for name, (tokenizer, limit) in pairs.items() if tokenizer is not None}
        return {name: (len(tokenizer(prompt, verbose=False)["input_ids"]), limit) for name, (tokenizer, limit) in there.items()}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer from its folder; nothing is downloaded and no code from the folder runs."""
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)  # our own scan reports cut captions
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelFileError(
            "the tokenizer cannot be loaded", where=str(folder), why=str(error).splitlines()[0], fix="copy the tokenizer folder again"
        ) from None


def _limit(tokenizer: PreTrainedTokenizerBase) -> int:
    limit = tokenizer.model_max_length
    return int(limit) if limit < 100_000 else 100_000  # transformers uses 1e30 for "no limit"


def _encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int) -> dict[str, Tensor]:
    encoded = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
