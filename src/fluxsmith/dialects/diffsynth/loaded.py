"""Files in their places -> the parts of a native pipeline: models, and one control of each kind that these files make possible.

The controls are templates: a call takes copies of them with its own pictures (`Control.given`), on the same networks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fluxsmith.config.choice import realise
from fluxsmith.config.control import ControlConfig, Ground
from fluxsmith.controls.base import Control, Site
from fluxsmith.dialects.diffsynth.model_config import ModelConfig
from fluxsmith.dialects.diffsynth.parts import Part, Parts
from fluxsmith.errors import ConfigError, FluxsmithError, Problem
from fluxsmith.generate.controls import IMPLIED, control_section
from fluxsmith.io.tokenizer_files import find_tokenizer
from fluxsmith.models.assembly import Models
from fluxsmith.models.load import load_ae, load_clip_l, load_dit, load_t5xxl
from fluxsmith.models.text_encoders import Tokenizers, load_tokenizer

LENGTHS = (77, 512)
FREE = ("kontext", "eligen")  # controls without weights of their own


@dataclass
class Opening:
    """How a pipeline is loaded."""

    torch_dtype: torch.dtype = torch.bfloat16
    device: str | torch.device = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    model_configs: Sequence[ModelConfig] = ()
    tokenizer_1_config: ModelConfig | None = field(default_factory=lambda: _tokenizer("tokenizer/"))
    tokenizer_2_config: ModelConfig | None = field(default_factory=lambda: _tokenizer("tokenizer_2/"))
    nexus_gen_processor_config: ModelConfig | None = field(
        default_factory=lambda: ModelConfig(model_id="DiffSynth-Studio/Nexus-GenV2", origin_file_pattern="processor/")
    )
    step1x_processor_config: ModelConfig | None = field(
        default_factory=lambda: ModelConfig(model_id="Qwen/Qwen2.5-VL-7B-Instruct", origin_file_pattern="")
    )
    vram_limit: float | None = None


def _tokenizer(folder: str) -> ModelConfig:
    return ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern=folder)


@dataclass
class Loaded:
    """What a pipeline is made of."""

    models: Models
    ground: Ground
    templates: dict[str, list[Control]] = field(default_factory=dict)

    def nets(self, control: str) -> list[Any]:
        """The networks of the controls of a kind."""
        return [net for one in self.templates.get(control, ()) for net in one.nets]


def load(parts: Parts, how: Opening) -> Loaded:
    """All parts on the device. Raises one error with what is missing beside a control before any weight is read."""
    ground = ground_of(parts)
    entries = [control_section(entry) for entry in control_entries(parts, ground)]
    problems = [problem for entry in entries for problem in realise(entry).misfits(ground)]
    if problems:
        raise ConfigError(str(problems[0]), problems=tuple(problems))
    folders = tokenizer_folders(parts, how)
    models = load_models(parts, how)
    models.tokenizers = load_tokenizers(folders)
    return Loaded(models, ground, templates(entries, models, how))


def ground_of(parts: Parts) -> Ground:
    """What the headers tell."""
    dit = parts.one("dit")
    sizes: Mapping[str, Any] = dit.identity.sizes if dit else {}
    family = dit.identity.family if dit else "flux1"
    there = tuple(role for role in ("dit", "clip_l", "t5xxl", "ae") if parts.one(role))
    return Ground(family=family, in_channels=int(sizes.get("in_channels") or 64), roles=there)


def control_entries(parts: Parts, ground: Ground) -> Iterator[dict[str, Any]]:
    """The `[[control]]` sections that these files stand for, without pictures."""
    for name in (*FREE, *filter(None, [IMPLIED.get(ground.in_channels)])):
        if name != "eligen" or "t5xxl" in ground.roles:
            yield {"type": name}
    for part in parts.all("controlnet"):
        yield {"type": "controlnet", "path": str(part.path)}
    for part in parts.all("value_encoder"):
        yield {"type": "value", "path": str(part.path)}
    encoder = parts.one("image_encoder")
    looks = {"encoder": str(encoder.path)} if encoder else {}
    if redux := parts.one("redux"):
        yield {"type": "redux", "path": str(redux.path), "keep_prompt": False, **looks}
    if lora_encoder := parts.one("lora_encoder"):
        yield {"type": "lora_encoder", "path": str(lora_encoder.path)}


def templates(entries: Sequence[ControlConfig], models: Models, how: Opening) -> dict[str, list[Control]]:
    """One control of each entry by its type, each network loaded once."""
    if models.dit is None:
        raise ValueError("the transformer is not loaded")
    site = Site(models.dit, how.torch_dtype, torch.device(how.device))
    made: dict[str, list[Control]] = {}
    for entry in entries:
        made.setdefault(entry.type, []).append(realise(entry).build(site))
    return made


def load_models(parts: Parts, how: Opening) -> Models:
    """Transformer, text encoders and autoencoder, each in the type that its ModelConfig computes in."""

    def place(part: Part) -> dict[str, Any]:
        config = part.config
        return {"device": config.computation_device or how.device, "dtype": config.computation_dtype or how.torch_dtype}

    models = Models()
    loaders: dict[str, Any] = {"dit": load_dit, "clip_l": load_clip_l, "t5xxl": load_t5xxl, "ae": load_ae}
    for role, loader in loaders.items():
        part = parts.one(role)
        if part is not None:
            setattr(models, role, loader(part.path, **place(part)))
    return models


def tokenizer_folders(parts: Parts, how: Opening) -> dict[str, Path]:
    """The folders of the tokenizers that the text encoders need. Raises one error that lists every place looked at."""
    found, problems = dict[str, Path](), list[Problem]()
    for role, config in (("clip_l", how.tokenizer_1_config), ("t5xxl", how.tokenizer_2_config)):
        part = parts.one(role)
        if part is None:
            continue
        try:
            found[role] = tokenizer_folder(role, part, config)
        except FluxsmithError as error:
            problems += error.problems
    if problems:
        raise ConfigError(str(problems[0]), problems=tuple(problems))
    return found


def tokenizer_folder(role: str, part: Part, config: ModelConfig | None) -> Path:
    """The configured folder; where that is the hub's, a tokenizer beside the encoder comes first, so that local files are enough."""
    if config is not None and (config.path is not None or config.is_here):
        return config.folder()
    try:
        return find_tokenizer(role, part.path)
    except FluxsmithError:
        if config is None:
            raise
        return config.folder()


def load_tokenizers(folders: Mapping[str, Path]) -> Tokenizers | None:
    """Both tokenizers; None for a model that takes no text of its own."""
    if "t5xxl" not in folders:
        return None
    clip = load_tokenizer(folders["clip_l"]) if "clip_l" in folders else None
    return Tokenizers(clip, load_tokenizer(folders["t5xxl"]), clip_length=LENGTHS[0], t5_length=LENGTHS[1])
