"""The four pairs of device and type of every ModelConfig in native terms: where parts rest and work, and how weights are stored.

Offload is where weights rest (`cpu`, `disk`, the card), onload where a layer waits while its part works, preparing what may stay on the
card within `vram_limit`, computation the type of the products.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fluxsmith.config.load import load_quant
from fluxsmith.config.quant import QuantConfig
from fluxsmith.controls.base import Control
from fluxsmith.dialects.diffsynth.model_config import ModelConfig
from fluxsmith.dialects.diffsynth.parts import BASE, QUANTISED, Parts
from fluxsmith.errors import ConfigError
from fluxsmith.generate.residency import Named, Residency
from fluxsmith.io.sources import home
from fluxsmith.memory.components import Components, Refill, Rule
from fluxsmith.models.assembly import Models
from fluxsmith.quant.names import options_of

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
DISK, GIB = "disk", 2**30


@dataclass
class Management:
    """What is asked of the device's memory: a limit in GiB, and a rule for each part; everything stays there where both are missing."""

    device: torch.device
    limit: float | None = None
    rules: dict[str, Rule] = field(default_factory=dict)
    is_on: bool = False

    @property
    def loads_to(self) -> torch.device:
        """Where files are read to."""
        return torch.device("cpu") if self.is_on else self.device

    def start(self, models: Models, controls: Sequence[Control], refill: Refill | None, *, pixels: int) -> Named | None:
        """Take the parts in hand; None where everything stays on the device."""
        if not self.is_on:
            return None
        if self.limit is not None and all(rule.work == "device" for rule in self.rules.values()):
            return Residency(models, controls, self.limit, self.device, pixels=pixels)
        return ByRule(models, controls, self.streaming() if self.limit is not None else self.rules, self.device, refill)

    def streaming(self) -> dict[str, Rule]:
        """The rules under a limit that leaves no room for parts as a whole: every stack comes layer by layer."""
        return {role: rule if rule.streams() else rule._replace(rest="host", work="host") for role, rule in self.rules.items()}


class ByRule(Named):
    """Parts by their rules; networks of controls rest on the host."""

    def __init__(
        self, models: Models, controls: Sequence[Control], rules: Mapping[str, Rule], device: torch.device, refill: Refill | None
    ) -> None:
        super().__init__(models, controls)
        self.components = Components(self.parts, device, rules=rules, refill=refill)
        self.components.rest()


def management(parts: Parts, device: torch.device, vram_limit: float | None) -> Management:
    """What the ModelConfigs and the limit ask for. Raises ConfigError for places that do not exist."""
    configs = {role: part.config for role in BASE if (part := parts.one(role))}
    is_on = vram_limit is not None or any(config.is_managed for config in configs.values())
    rules = {role: rule_of(config, limited=vram_limit is not None) for role, config in configs.items()} if is_on else {}
    return Management(device, vram_limit, rules, is_on)


def rule_of(config: ModelConfig, *, limited: bool) -> Rule:
    """Where one part rests and works."""
    if not config.is_managed:
        return Rule(rest="host" if limited else "device")
    offload, onload, preparing = (_kind(place) for place in (config.offload_device, config.onload_device, config.preparing_device))
    if preparing == DISK or (limited and DISK in (offload, onload)):
        return Rule(rest="host", work="disk", folder=home() / "streamed")
    if preparing == "cpu" and _kind(config.computation_device) != "cpu":
        return Rule(rest="host", work="host")
    return Rule(rest="disk" if offload == DISK else "device" if offload == "device" else "host")


def _kind(place: str | torch.device | None) -> str | None:
    """cpu, disk, or device for a card."""
    if place is None:
        return None
    name = str(place).partition(":")[0]
    if name not in ("cpu", DISK, "cuda", "npu", "xpu", "mps"):
        raise ConfigError(f"there is no device {place}", fix='write "cpu", "cuda" or "disk"')
    return name if name in ("cpu", DISK) else "device"


def quant_of(parts: Parts) -> QuantConfig | None:
    """The `quant` section for parts whose weights are stored in fewer bits than they compute in."""
    kinds = {role: kind for role in QUANTISED if (part := parts.one(role)) and (kind := stored_as(part.config))}
    own: dict[str, Any] = (options_of(kinds["dit"], "diffsynth") or {}) if "dit" in kinds else {}
    encoders = {role: (options_of(kind, "diffsynth") or {})["type"] for role, kind in kinds.items() if role != "dit"}
    if not kinds:
        return None
    return load_quant({"type": "none", **own, **({"text_encoders": encoders} if encoders else {})})


def stored_as(config: ModelConfig) -> str:
    """The name of a quantisation, as DiffSynth-Studio has it; empty for none. Raises ConfigError for a kind without an equal."""
    if config.quantize is not None:
        return str(getattr(config.quantize, "method", config.quantize))
    if config.computation_dtype in FP8:
        return "torchao_fp8_w8a8"
    stored = (config.offload_dtype, config.onload_dtype, config.preparing_dtype)
    return "float8_e4m3fn" if any(dtype in FP8 for dtype in stored) else ""


def computes_in(config: ModelConfig, default: torch.dtype) -> torch.dtype:
    """The type of activations."""
    dtype = config.computation_dtype
    return default if dtype is None or dtype in FP8 else dtype


def legacy(device: torch.device, persistent: int | None, vram_limit: float | None, vram_buffer: float) -> Management:
    """`enable_vram_management`: weights of the transformer that stay on the device, or a limit in GiB (all of it by default)."""
    rules = {role: Rule() for role in BASE}
    if persistent is not None:
        return Management(device, None, rules | {"dit": Rule(persistent=persistent)}, is_on=True)
    if vram_limit is None and device.type == "cuda":
        vram_limit = torch.cuda.get_device_properties(device).total_memory / GIB
    return Management(device, None if vram_limit is None else max(0.0, vram_limit - vram_buffer), rules, is_on=True)
