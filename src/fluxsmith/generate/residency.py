"""Drawing within a limit of device memory: parts are there only while they work, layers beyond the limit visit one after the other."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from fluxsmith.controls.base import Control
from fluxsmith.memory.block_swap import BlockSwap, Streaming
from fluxsmith.memory.components import Components, size_of
from fluxsmith.memory.drawing import Drawing, Part, within
from fluxsmith.memory.layer_stream import LayerStream, layers_of
from fluxsmith.memory.masters import Host, move_resident
from fluxsmith.memory.modulation import LookAhead
from fluxsmith.memory.sizes import evenly_spaced
from fluxsmith.memory.slots import Lane
from fluxsmith.models.assembly import Models
from fluxsmith.models.flux import FluxDiT

LEAST = 1024 * 1024  # pixels; places are planned once, by the first picture, and later ones may be larger
TEXT_TOKENS = 512
PHASES = {"clip_l": "text", "t5xxl": "text", "dit": "denoise", "ae": "decode"}


class Named:
    """The parts of one loaded model and the networks of its controls by name, and who of them is on the device."""

    components: Components

    def __init__(self, models: Models, controls: Sequence[Control]) -> None:
        nets = {id(net): net for control in controls for net in control.nets}
        self.names = {key: f"control {number}" for number, key in enumerate(nets)}
        self.parts: dict[str, nn.Module] = models.loaded() | {self.names[key]: net for key, net in nets.items()}

    def on(self, *parts: str | nn.Module) -> None:
        """These parts of the model and networks of controls work next; only they are on the device."""
        self.components.on(*(part if isinstance(part, str) else self.names[id(part)] for part in parts))


class Residency(Named):
    """Who is on the device when, within a limit."""

    def __init__(
        self,
        models: Models,
        controls: Sequence[Control],
        limit: float,
        device: torch.device,
        *,
        pixels: int,
        folder: Path | None = None,
    ) -> None:
        """`folder`: layers that wait are memory-mapped files there instead of host memory."""
        super().__init__(models, controls)
        parts = self.parts
        denoising = {id(net) for control in controls for net in control.denoising}
        phases = {name: _phase(name, id(part) in denoising) for name, part in parts.items()}
        self.device = device
        self.host = Host(pin=device.type == "cuda", disk=folder)
        self.lanes: dict[nn.Module, list[Lane]] = {}
        if models.dit is not None:
            look = LookAhead(models.dit, device, host=self.host, bakes=True)
            if look.layers:
                look.attach()
        self.plan = _plan(models, {name: (parts[name], phases[name]) for name in parts}, controls, limit, pixels=pixels)
        for name, count in self.plan.streamed.items():
            self._stream(parts[name], count)
        self.components = Components(parts, device, move=self._move)

    def _stream(self, part: nn.Module, count: int) -> None:
        layers = _layers(part)
        indices = evenly_spaced(count, len(layers))
        if isinstance(part, FluxDiT):
            swap = BlockSwap(part, Streaming(tuple(indices)), self.device, host=self.host)
            swap.attach()
            self.lanes[part] = [swap.lane, swap.mod_lane]
        else:
            stream = LayerStream([layers[i] for i in indices], self.device, host=self.host)
            stream.attach()
            self.lanes[part] = [stream.lane]

    def _move(self, part: nn.Module, device: torch.device) -> None:
        move_resident(part, device)
        if device != self.device or device.type == "cpu":
            for lane in self.lanes.get(part, ()):
                lane.drop()


def _phase(name: str, denoises: bool) -> str:
    return "denoise" if denoises else PHASES.get(name, f"prepare {name}")


def _layers(part: nn.Module) -> Sequence[nn.Module]:
    return part.blocks if isinstance(part, FluxDiT) else layers_of(part)


def _plan(models: Models, parts: dict[str, tuple[nn.Module, str]], controls: Sequence[Control], limit: float, *, pixels: int) -> Drawing:
    dit, pixels = models.dit, max(pixels, LEAST)
    sizes = []
    for name, (part, phase) in parts.items():
        layers = tuple(size_of(layer) for layer in _layers(part))
        sizes.append(Part(name, phase, layers, size_of(part) - sum(layers)))
    tokens = pixels // 256 + TEXT_TOKENS + sum(control.added_tokens for control in controls)
    width = 2 if dit is None else dit.dtype.itemsize
    return within(sizes, limit, tokens=tokens, hidden=dit.params.hidden_size if dit is not None else 0, pixels=pixels, width=width)
