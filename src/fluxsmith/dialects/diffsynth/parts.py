"""What the given files are, sorted by the place that each takes in the pipeline. Headers only.

`sorted_parts([ModelConfig(...), ...])` raises one error with everything that is missing, twice there, or no part of a pipeline.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fluxsmith.dialects.diffsynth.model_config import ModelConfig
from fluxsmith.errors import FluxsmithError, ModelFileError, Problem
from fluxsmith.io.identify import identify
from fluxsmith.io.identity import Identity
from fluxsmith.io.shards import SHARD

BASE = ("dit", "clip_l", "t5xxl", "ae")
QUANTISED = ("dit", "clip_l", "t5xxl")
SEVERAL = ("controlnet", "value_encoder", "image_encoder")
PLACES = {  # role of a file -> place in the pipeline
    **{role: role for role in (*BASE, *SEVERAL)},
    "tiny_ae": "ae",
    "ip_adapter": "ip_adapter",
    "image_encoder": "image_encoder",
    "image_embedder": "redux",
    "face_projector": "face_projector",
    "lora_encoder": "lora_encoder",
    "lora_fusion": "lora_fusion",
    "language_model": "language_model",
}
NAMES = {
    "dit": ("a FLUX transformer", "flux1-dev.safetensors"),
    "clip_l": ("the CLIP-L text encoder", "text_encoder/model.safetensors"),
    "t5xxl": ("the T5 text encoder", "text_encoder_2/*.safetensors"),
    "ae": ("the autoencoder", "ae.safetensors"),
}
WITHOUT = {"step1x": ("clip_l", "t5xxl"), "chroma": ("clip_l",)}  # family -> encoders it has no use for


@dataclass(frozen=True)
class Part:
    """A file with what it is, and the ModelConfig that named it."""

    path: Path
    identity: Identity
    config: ModelConfig


@dataclass
class Parts:
    """All files by place; several only where a pipeline can have several, in the order of the list."""

    by_place: dict[str, list[Part]] = field(default_factory=dict)

    def one(self, place: str) -> Part | None:
        """The file of a place that has one at most."""
        found = self.by_place.get(place)
        return found[0] if found else None

    def all(self, place: str) -> list[Part]:
        """The files of a place."""
        return self.by_place.get(place, [])


def sorted_parts(configs: Sequence[ModelConfig]) -> Parts:
    """Files by place. Raises one ModelFileError with all findings."""
    parts, problems = Parts(), list[Problem]()
    for config in configs:
        try:
            for path in one_of_each(config.weights(), config.describe()):
                _place(parts, Part(path, identify(path), config))
        except FluxsmithError as error:
            problems += error.problems
    problems += () if problems else _incomplete(parts)
    if problems:
        raise ModelFileError(str(problems[0]), problems=tuple(problems))
    return parts


def one_of_each(paths: Sequence[Path], what: str) -> list[Path]:
    """The first of every set of shards, and all single files. Raises ModelFileError where nothing is left."""
    firsts = dict[str, Path]()
    for path in paths:
        shard = SHARD.fullmatch(path.name)
        firsts.setdefault(str(path.parent / shard["stem"]) if shard else str(path), path)
    if not firsts:
        raise ModelFileError(f"{what}: no weights among these files", fix="name a .safetensors file")
    return [*firsts.values()]


def _place(parts: Parts, part: Part) -> None:
    where, found = str(part.path), part.identity
    if part.config.clear_parameters:
        raise ModelFileError("clear_parameters leaves a model without weights", where=where, why="it is for training", fix="leave it out")
    if part.config.quantize is not None and not set(found.roles()) <= set(QUANTISED):
        raise ModelFileError(
            f"{found.describe()} cannot be quantised", where=where, fix=f"leave quantize out; {', '.join(QUANTISED)} can be"
        )
    if found.role == "lora":
        raise ModelFileError("this is an adapter, not a model", where=where, fix="load it with pipe.load_lora(pipe.dit, ...)")
    for role in found.roles():
        place = PLACES.get(role)
        if place is None:
            raise ModelFileError(f"this is {found.describe()}", where=where, why="it has no place in a FLUX pipeline", fix="leave it out")
        if found.unusable:
            raise ModelFileError(f"this is {found.describe()}, but {'; '.join(found.unusable)}", where=where, fix="get a complete file")
        others = parts.by_place.setdefault(place, [])
        if others and place not in SEVERAL:
            why = f"{others[0].path} is one too"
            raise ModelFileError(f"this is a second one of its kind: {found.describe()}", where=where, why=why, fix="leave one of them out")
        others.append(part)


def _incomplete(parts: Parts) -> Iterator[Problem]:
    dit = parts.one("dit")
    unneeded = WITHOUT.get(dit.identity.family, ()) if dit is not None else ()
    for role, (name, example) in NAMES.items():
        if parts.one(role) is None and role not in unneeded:
            yield Problem(f"{name} is missing from model_configs", fix=f'add ModelConfig(model_id=..., origin_file_pattern="{example}")')
