"""Trained blocks that wait on the host: at rest their tensors are views of a master there, while a block computes of a slot on the device.

Unlike frozen ones (`block_swap.py`) they change: inside the backward pass, where they are then copied back, or on the host, where the
copies in the slots are then forgotten. Parameters keep their identity, so an optimizer may hold them.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fluxsmith.memory.block_swap import Streaming
from fluxsmith.memory.masters import Host, Master
from fluxsmith.memory.slots import Copier, Lane, Schedule
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.layers import Modulation


def travelling(block: nn.Module) -> dict[str, nn.Parameter]:
    """A block's tensors but those of its modulations, which are not recomputed and stay on the device."""
    stay = {id(p) for module in block.modules() if isinstance(module, Modulation) for p in module.parameters()}
    return {name: param for name, param in block.named_parameters() if id(param) not in stay}


class TrainedSwap:
    """Masters of some blocks' trained weights. `attach` makes the calls bring them in."""

    def __init__(
        self, dit: FluxDiT, how: Streaming, device: torch.device, *, host: Host | None = None, copier: Copier | None = None
    ) -> None:
        self.dit = dit
        self.place: dict[nn.Module, int] = {}  # block -> unit
        self.home: dict[nn.Parameter, tuple[int, str]] = {}
        host, masters, chosen = host or Host(pin=device.type == "cuda"), [], sorted(how.indices)
        for unit, group in enumerate(chosen[i : i + how.per_unit] for i in range(0, len(chosen), how.per_unit)):
            params = {f"{number}/{name}": p for number, i in enumerate(group) for name, p in travelling(dit.blocks[i]).items()}
            self.place |= {dit.blocks[index]: unit for index in group}
            self.home |= {param: (unit, key) for key, param in params.items()}
            masters.append(Master(params, host))
        self.lane = Lane(masters, device, Schedule(len(masters), how.slots, prefetch=how.prefetch), copier)
        self.views = [master.views(master.buffer) for master in masters]
        self.here: int | None = None  # unit whose tensors are in a slot
        self.point(range(len(masters)))

    def attach(self) -> None:
        """From now on `dit.call` brings weights in for each call of a swapped block."""
        run = self.dit.call

        def call(block: nn.Module, *inputs: object) -> tuple[Tensor, Tensor]:
            unit = self.place.get(block)
            if unit is not None and unit != self.here:
                self.bring(unit)
            return run(block, *inputs)

        self.dit.call = call

    def bring(self, unit: int) -> None:
        """The unit's tensors lie in a slot, those of the last one at rest."""
        if self.here is not None:
            self.point([self.here])
        views = self.lane.bring(unit, returns=torch.is_grad_enabled())
        for param, (own, key) in self.home.items():
            if own == unit:
                param.data = views[key]
        self.here = unit

    def point(self, units: Iterable[int]) -> None:
        """The tensors of these units lie in their masters."""
        wanted = set(units)
        for param, (unit, key) in self.home.items():
            if unit in wanted:
                param.data = self.views[unit][key]

    def wrote(self, params: Iterable[nn.Parameter]) -> None:
        """These tensors were changed where they are: what lies in the slot goes to the master."""
        for param in params:
            unit, key = self.home.get(param, (None, ""))
            if unit is not None and unit == self.here:
                self.lane.store(unit, key)

    def rest(self) -> None:
        """Everything lies in its master, and slots hold nothing: masters may be read and changed."""
        if self.here is not None:
            self.point([self.here])
        self.here = None
        self.lane.forget()

    @property
    def host_bytes(self) -> int:
        """Size of all masters."""
        return self.lane.host_bytes
