"""Files in their places -> the parts of a native pipeline: models, and one control of each kind that these files make possible.

The controls are templates: a call takes copies of them with its own pictures (`Control.given`), on the same networks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fluxsmith.adapters.fusion import LoraFusion, load_fusion
from fluxsmith.config.choice import realise
from fluxsmith.config.control import ControlConfig, Ground
from fluxsmith.config.load import load_model
from fluxsmith.config.section import PluginConfig
from fluxsmith.controls.base import Control, Site
from fluxsmith.dialects.diffsynth.entries import FREE, control_entries, ground_of
from fluxsmith.dialects.diffsynth.memory import Management, computes_in, management, quant_of
from fluxsmith.dialects.diffsynth.opening import Opening, tokenizer_folders
from fluxsmith.dialects.diffsynth.parts import BASE, Parts
from fluxsmith.errors import ConfigError
from fluxsmith.generate.controls import control_section
from fluxsmith.memory.components import Refill
from fluxsmith.models.assembly import Models
from fluxsmith.models.files import locate
from fluxsmith.models.loading import LazyModels
from fluxsmith.quant.base import loading, quantise


@dataclass
class Loaded:
    """What a pipeline is made of."""

    models: Models
    ground: Ground
    templates: dict[str, list[Control]] = field(default_factory=dict)
    management: Management = field(default_factory=lambda: Management(torch.device("cpu")))
    refill: Refill | None = None
    fusion: LoraFusion | None = None

    def nets(self, control: str) -> list[Any]:
        """The networks of the controls of a kind."""
        return [net for one in self.templates.get(control, ()) for net in one.nets]

    def controls(self) -> list[Control]:
        """All templates."""
        return [control for of_kind in self.templates.values() for control in of_kind]


def load(parts: Parts, how: Opening) -> Loaded:
    """All parts, on the device or where the management of memory wants them.

    Raises one error with what is missing beside a control, or cannot be done on the device, before any weight is read.
    """
    ground, device = ground_of(parts), torch.device(how.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device", fix='pass device="cpu", or install torch for your card and its driver')
    entries = [control_section(entry) for entry in control_entries(parts, ground, how)]
    problems = [problem for entry in entries if entry.type not in FREE for problem in realise(entry).misfits(ground)]
    if problems:
        raise ConfigError(str(problems[0]), problems=tuple(problems))
    model, quant, managed = model_section(parts, how), quant_of(parts), management(parts, device, how.vram_limit)
    types = {role: computes_in(part.config, how.torch_dtype) for role in BASE if (part := parts.one(role))}
    loads = loading(quant, types["dit"], device)._replace(ae_dtype=types["ae"])
    lazy = LazyModels(locate(model), model, managed.loads_to, loads)
    models = lazy.get([role for role in BASE if parts.one(role)])
    if quant is not None and models.dit is not None:
        quantise(quant, "dit", models.dit)
    controls, merges = templates(entries, models, how.torch_dtype, managed.loads_to), parts.one("lora_fusion")
    fusion = None if merges is None else load_fusion(merges.path, device=managed.loads_to, dtype=how.torch_dtype)
    return Loaded(models, ground, controls, managed, lazy.refill, fusion)


def model_section(parts: Parts, how: Opening) -> PluginConfig:
    """The native `model` section of these files."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    found = {role: part for role in BASE if (part := parts.one(role))}
    section: dict[str, Any] = {"path" if role == "dit" else role: str(part.path) for role, part in found.items()}
    if "clip_l" not in found and "t5xxl" in found:
        section |= {"type": "chroma", "text_dtype": names[computes_in(found["t5xxl"].config, how.torch_dtype)]}
    else:
        encoders = [role for role in ("clip_l", "t5xxl") if role in found]
        section |= {"type": "flux1", "text_dtype": {role: names[computes_in(found[role].config, how.torch_dtype)] for role in encoders}}
    for role, folder in tokenizer_folders(parts, how).items():
        section["tokenizer" if role == "clip_l" else "tokenizer_2"] = str(folder)
    return load_model({"model": section})


def templates(entries: Sequence[ControlConfig], models: Models, dtype: torch.dtype, device: torch.device) -> dict[str, list[Control]]:
    """One control of each entry by its type, each network loaded once."""
    if models.dit is None:
        raise ValueError("the transformer is not loaded")
    site = Site(models.dit, dtype, device)
    made: dict[str, list[Control]] = {}
    for entry in entries:
        made.setdefault(entry.type, []).append(realise(entry).build(site))
    return made
