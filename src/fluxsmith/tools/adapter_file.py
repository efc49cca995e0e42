"""What tools say about the adapter files that they write: the format a file came in, its true ranks, and its metadata."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from fluxsmith.adapters.formats.files import FORMATS, Format, convert, read_adapter, with_heights
from fluxsmith.adapters.formats.peft import METADATA_KEY
from fluxsmith.adapters.formats.state import AdapterState
from fluxsmith.errors import ConfigError
from fluxsmith.io.metadata import ModelSpec, modelspec
from fluxsmith.io.sources import resolve
from fluxsmith.tools.model_file import Given, model_file, roles_in
from fluxsmith.tools.outputs import fresh

WRITERS: Mapping[str, Format] = {  # key style -> format that writes such names
    "kohya": "kohya", "onetrainer": "onetrainer", "lycoris": "lycoris", "peft": "peft", "diffusers": "peft", "comfy_bfl": "comfy",
    "bfl": "comfy", "bfl_peft": "bfl_peft", "diffsynth": "diffsynth", "xlabs": "xlabs", "bfl_control": "bfl_control",
}  # fmt: skip
RANK_ENTRIES = ("ss_network_dim", "ss_network_alpha")
DYNAMIC = "Dynamic"


def format_named(name: str) -> Format:
    """A format by name. Raises ConfigError."""
    if name not in FORMATS:
        raise ConfigError(f"there is no adapter format {name!r}", fix=f"use one of {', '.join(FORMATS)}")
    return cast(Format, name)


def format_of(state: AdapterState) -> Format:
    """The format that a file was read from; PEFT names without PEFT's header entry are ai-toolkit's."""
    if state.format == "peft" and METADATA_KEY not in state.metadata:
        return "ai_toolkit"
    return WRITERS.get(state.format, "kohya")


def ranks_of(state: AdapterState) -> tuple[int | str, float | str]:
    """Rank and alpha if all parts have the same, else `Dynamic`."""
    parts = [part for layer in state.layers.values() for part in layer.parts if part.rank]
    ranks, alphas = {part.rank for part in parts}, {part.alpha for part in parts}
    return (ranks.pop() if len(ranks) == 1 else DYNAMIC), (alphas.pop() if len(alphas) == 1 else DYNAMIC)


def rank_entries(state: AdapterState, form: Format) -> dict[str, str]:
    """ss_network_dim and ss_network_alpha of the file that a format makes of this."""
    tensors, metadata = convert(state, form)
    rank, alpha = ranks_of(FORMATS[form].read(tensors, metadata))
    return {"ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}


def rewritten(state: AdapterState, form: Format, entries: Mapping[str, str] | None = None) -> dict[str, str]:
    """A file's own metadata for its new form: without what is no longer true, with true ranks where it named them, and new entries."""
    kept = fresh(state.metadata)
    named = [key for key in RANK_ENTRIES if key in kept]
    true = rank_entries(state, form) if named else {}
    return kept | {key: true[key] for key in named} | dict(entries or {})


def new_metadata(
    state: AdapterState, form: Format, *, title: str, variant: str, entries: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Metadata of a LoRA that no training made."""
    version = "chroma" if variant == "chroma" else "flux1"
    values: dict[str, Any] = {
        "ss_v2": False,
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora_flux",
        "ss_network_args": "{}",
    }
    texts = {key: str(value) for key, value in values.items()}
    return texts | rank_entries(state, form) | modelspec(ModelSpec(title, variant or "dev")) | dict(entries or {})


def adapter(given: Given, base: Given | None = None) -> AdapterState:
    """An adapter file; sizes that it does not tell come from the base model's header. Raises ModelFileError."""
    state = read_adapter(resolve(given, "lora"))
    missing = [path for path, layer in state.layers.items() if layer.out_features is None]
    return with_heights(state, heights(base, {path.split(".", 1)[0] for path in missing})) if missing and base is not None else state


def heights(base: Given, roles: Iterable[str]) -> dict[str, int]:
    """Output rows by layer path, for the roles that the base file has."""
    made: dict[str, int] = {}
    for role in roles:
        path = Path(base)
        if not path.exists() or path.is_dir() or role in roles_in(path):
            with model_file(base, role) as file:
                made |= {f"{role}.{layer}": file.shapes[f"{layer}.weight"][0] for layer in file.layers()}
    return made


def widest(states: Iterable[AdapterState]) -> torch.dtype:
    """The most precise type among the tensors of adapters."""
    dtypes = {
        tensor.dtype for state in states for layer in state.layers.values() for part in layer.parts for tensor in part.tensors.values()
    }
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max(floats, key=lambda dtype: (dtype.itemsize, dtype == torch.bfloat16), default=torch.float32)
