"""A FLUX model of a few thousand weights with its files, and runs on it that take a fraction of a second.

One double and one single block of width 32, text encoders and autoencoder to match. `write_model(folder)` once, then
`config(folder, run_dir, ...)` as often as wanted. Used by tests/train, tests/test_distributed.py and bench/.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from fluxsmith.config.load import load_config
from fluxsmith.config.schema import RunConfig
from fluxsmith.demo.tokenizer import EOS, vocabulary, write_tokenizers
from fluxsmith.io.safetensors import save_weights
from fluxsmith.models.chroma import Chroma, ChromaParams
from fluxsmith.models.flux import FluxDiT, FluxParams, axes_for_head
from fluxsmith.models.linear import Linear, xavier_
from fluxsmith.models.text_encoders import CLIP_ROOT, ClipParams, ClipText, T5Params, T5Text
from fluxsmith.models.tiny_autoencoder import TinyAutoEncoder, TinyAutoEncoderParams

TEXT, HIDDEN, HEAD = 16, 32, 16
CAPTIONS = ("a red circle", "a blue square", "a green star", "a yellow ring", "a large red heart", "a small blue moon")

Options = Mapping[str, Any]


def flux_params() -> FluxParams:
    """One block of each kind."""
    return FluxParams(
        in_channels=64, out_channels=64, vec_in_dim=TEXT, context_in_dim=TEXT, hidden_size=HIDDEN, mlp_hidden=2 * HIDDEN,
        num_heads=HIDDEN // HEAD, depth=1, depth_single_blocks=1, axes_dim=axes_for_head(HEAD),
    )  # fmt: skip


def random_dit(seed: int = 0) -> FluxDiT:
    """A transformer whose every part does something (nothing starts at zero)."""
    generator = torch.Generator().manual_seed(seed)
    dit = FluxDiT(flux_params())
    for module in dit.modules():
        if isinstance(module, Linear):
            xavier_(module, generator)
    return dit


def random_chroma(seed: int = 0) -> Chroma:
    """The same sizes as Chroma."""
    generator = torch.Generator().manual_seed(seed)
    params = ChromaParams(**asdict(replace(flux_params(), vec_in_dim=0)), approximator_hidden=24, approximator_layers=2)
    dit = Chroma(params)
    for module in dit.modules():
        if isinstance(module, Linear):
            xavier_(module, generator)
    return dit


def chroma_model(model: Path) -> dict[str, str]:
    """The `model` section of the tiny Chroma."""
    files = {"path": "chroma", "t5xxl": "t5xxl", "ae": "ae"}
    section = {key: str(model / f"{name}.safetensors") for key, name in files.items()}
    return {"type": "chroma", "tokenizer_2": str(model / "tokenizer_2"), **section}


def write_model(folder: Path, seed: int = 0) -> Path:
    """All files of the model; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        size, eos = len(vocabulary()), vocabulary()[EOS]
        clip = ClipText(ClipParams(size, TEXT, 2 * TEXT, 1, 24, 2, eos)).model
        nn.init.normal_(clip.get_input_embeddings().weight, std=0.5)
        t5 = T5Text(T5Params(size, TEXT, TEXT // 2, 2 * TEXT, 1, 2, 32)).model
        ae = TinyAutoEncoder(TinyAutoEncoderParams(8, 16, (1, 1, 1, 1), (1, 1, 1, 1)))
    clip_tensors = {CLIP_ROOT + key: value for key, value in clip.state_dict().items() if "position_ids" not in key}
    t5_tensors = {key: value for key, value in t5.state_dict().items() if key != "encoder.embed_tokens.weight"}
    hints = {"fluxsmith.model": json.dumps({"num_attention_heads": 2, "eos_token_id": eos})}
    save_weights(folder / "dit.safetensors", random_dit(seed).state_dict())
    save_weights(folder / "chroma.safetensors", random_chroma(seed).state_dict())
    save_weights(folder / "clip_l.safetensors", clip_tensors, hints)
    save_weights(folder / "t5xxl.safetensors", t5_tensors)
    save_weights(folder / "ae.safetensors", ae.state_dict())
    write_tokenizers(folder)
    return folder


def write_pictures(folder: Path, count: int = 13, *, size: tuple[int, int] = (32, 32), seed: int = 0) -> Path:
    """Smooth random pictures with captions, two sizes; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        low = np.random.default_rng([seed, number]).integers(0, 256, (3, 3, 3), dtype=np.uint8)
        sides = size if number % 3 else (size[0] + 16, size[1])
        Image.fromarray(low).resize(sides, Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"{CAPTIONS[number % len(CAPTIONS)]} {number}", encoding="utf-8")
    return folder


def config(model: Path, run_dir: Path, changes: Options | None = None, *, data: Path | None = None) -> RunConfig:
    """A checked config: 13 pictures, accumulation 2, EMA, cosine, a state every 4 of 24 steps; `changes` by dotted key."""
    plain: dict[str, Any] = {
        "model": {"type": "flux1", "preset": "flux-shapes", "path": str(model / "dit.safetensors")}
        | {role: str(model / f"{role}.safetensors") for role in ("clip_l", "t5xxl", "ae")}
        | {"tokenizer": str(model / "tokenizer"), "tokenizer_2": str(model / "tokenizer_2")},
        "optim": {"type": "torch", "name": "adamw", "lr": 1e-3},
        "schedule": {"name": "cosine", "warmup": 3},
        "train": {"steps": 24, "seed": 5, "accumulation": 2, "device": "cpu", "threads": 1, "ema": {"decay": 0.9}},
        "data": [{"type": "folder", "path": str(data or model / "pictures"), "resolution": 32, "buckets": {"step": 16, "min": 16}}],
        "cache": {"dir": str(model / "cache")},
        "checkpoint": {"every": 4, "keep": 2, "dtype": "fp32"},
        "run": {"dir": str(run_dir)},
    }
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        place: Any = plain
        for part in path:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        if value is None:
            place.pop(last, None)
        else:
            place[last] = copy.deepcopy(value)  # a later key may reach into it
    return load_config(plain).config


LORA: Options = {"adapter": {"type": "lora", "rank": 2, "alpha": 2}}


def prepare_files(folder: Path) -> Path:
    """Model, pictures; the caches are filled by the first run."""
    write_model(folder)
    write_pictures(folder / "pictures")
    return folder
