"""How a pipeline is loaded: the parameters of `from_pretrained`, and where tokenizers are. Local folders are enough, the hub comes last."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fluxsmith.dialects.diffsynth.model_config import ModelConfig
from fluxsmith.dialects.diffsynth.parts import Part, Parts
from fluxsmith.errors import ConfigError, FluxsmithError, Problem
from fluxsmith.io.tokenizer_files import find_tokenizer

TOKENIZER_FILES = ("*.json", "*.txt")


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


def processor_folder(config: ModelConfig | None, weights: Part) -> str:
    """The folder of a language model's tokenizer: beside its weights (then empty), or the configured one."""
    beside = weights.path if weights.path.is_dir() else weights.path.parent
    if config is None or any((beside / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return ""
    if config.path is not None or config.origin_file_pattern:
        return str(config.folder())
    return str(replace(config, origin_file_pattern=TOKENIZER_FILES).folder())
