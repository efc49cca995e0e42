"""Two or three places on the device that units of weights visit in turn, and the order in which they come.

`Schedule` decides (pure), `Copier` copies, `Lane` puts both to work. On a card copies have a stream of their own and wait for events;
the host waits for nothing. While a unit computes, the next one in the direction of travel is on its way: forwards, then backwards.
The units around the turning point are still there when the backward pass begins, and the first ones when the next step does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fluxsmith.memory.masters import Master


class Load(NamedTuple):
    """A unit goes into a slot."""

    slot: int
    unit: int


class Schedule:
    """Which unit is in which slot. `visit(unit)` is told every use, in order of use."""

    def __init__(self, units: int, slots: int, *, prefetch: bool = True) -> None:
        self.units = units
        self.held: list[int | None] = [None] * min(slots, units)
        self.prefetch = prefetch
        self.last: int | None = None

    def visit(self, unit: int, *, returns: bool) -> list[Load]:
        """What to copy now: this unit first if it is not there, then those that come next.

        `returns`: a backward pass will come back the same way (or this is one); without it the first unit follows the last.
        """
        backward = returns and self.last is not None and (unit < self.last or (unit == self.last and unit > 0))
        self.last = unit
        ahead = self._ahead(unit, backward=backward, wraps=not returns) if self.prefetch else []
        loads: list[Load] = []
        for wanted in (unit, *ahead):
            if wanted not in self.held:
                slot = self._farthest({unit, *ahead})
                self.held[slot] = wanted
                loads.append(Load(slot, wanted))
        return loads

    def _ahead(self, unit: int, *, backward: bool, wraps: bool) -> list[int]:
        step = -1 if backward else 1
        places = [unit + step * distance for distance in range(1, len(self.held))]
        return [place % self.units for place in places] if wraps else [place for place in places if 0 <= place < self.units]

    def _farthest(self, kept: set[int]) -> int:
        """A slot that holds nothing, or else the unit that lies farthest away of those that nobody wants."""
        last = self.last or 0
        able = [slot for slot, unit in enumerate(self.held) if unit not in kept]
        return max(able, key=lambda slot: self.units if (unit := self.held[slot]) is None else abs(unit - last))


@dataclass
class Slot:
    """Memory on the device and its events."""

    buffer: Tensor
    ready: torch.cuda.Event | None = None
    released: torch.cuda.Event | None = None


class Copier:
    """Plain copies; override for a card, or to watch."""

    def slot(self, size: int, device: torch.device) -> Slot:
        """A new slot of this many bytes."""
        return Slot(torch.empty(size, dtype=torch.uint8, device=device))

    def copy(self, slot: Slot, source: Tensor) -> None:
        """Host buffer -> slot, after everything that still reads the slot."""
        slot.buffer[: source.numel()].copy_(source, non_blocking=True)

    def store(self, slot: Slot, start: int, stop: int, target: Tensor) -> None:
        """Bytes of a slot -> host, after everything that was given out to compute so far."""
        target.copy_(slot.buffer[start:stop], non_blocking=True)

    def settle(self) -> None:
        """The host sees everything that was stored."""

    def wait(self, slot: Slot) -> None:
        """What is computed from now on sees the slot's content."""

    def release(self, slot: Slot) -> None:
        """Everything that was given out to compute so far may still read the slot; nothing later does."""


class CudaCopier(Copier):
    """On a stream of its own; compute and copies wait for each other by events on the card."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def slot(self, size: int, device: torch.device) -> Slot:
        """As Copier.slot."""
        made = Slot(torch.empty(size, dtype=torch.uint8, device=device), torch.cuda.Event(), torch.cuda.Event())
        self.release(made)  # the allocator may hand out memory that compute still uses
        return made

    def copy(self, slot: Slot, source: Tensor) -> None:
        """As Copier.copy."""
        with torch.cuda.stream(self.stream):
            if slot.released is not None:
                self.stream.wait_event(slot.released)
            slot.buffer[: source.numel()].copy_(source, non_blocking=True)
            if slot.ready is not None:
                slot.ready.record(self.stream)

    def store(self, slot: Slot, start: int, stop: int, target: Tensor) -> None:
        """As Copier.store; a load into the slot or from the target, on the same stream, comes after it."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(slot.buffer[start:stop], non_blocking=True)

    def settle(self) -> None:
        """As Copier.settle: the one place where the host waits."""
        self.stream.synchronize()

    def wait(self, slot: Slot) -> None:
        """As Copier.wait."""
        if slot.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)

    def release(self, slot: Slot) -> None:
        """As Copier.release."""
        if slot.released is not None:
            slot.released.record(torch.cuda.current_stream(self.device))


def copier_for(device: torch.device) -> Copier:
    """Streams and events on a card, plain copies elsewhere."""
    return CudaCopier(device) if device.type == "cuda" else Copier()


class Lane:
    """Units that visit the device in slots."""

    def __init__(self, masters: Sequence[Master], device: torch.device, schedule: Schedule, copier: Copier | None = None) -> None:
        self.masters = masters
        self.device = device
        self.schedule = schedule
        self.copier = copier or copier_for(device)
        self.slots: list[Slot] = []
        self.current: int | None = None  # slot in use

    @property
    def host_bytes(self) -> int:
        """Size of all masters."""
        return sum(master.size for master in self.masters)

    @property
    def device_bytes(self) -> int:
        """Size of all slots, once they are there."""
        return max((master.size for master in self.masters), default=0) * len(self.schedule.held)

    @torch.no_grad()
    def bring(self, unit: int, *, returns: bool = False) -> dict[str, Tensor]:
        """The unit's tensors on the device. They are valid until another unit is brought."""
        if not self.slots:
            size = max(master.size for master in self.masters)
            self.slots = [self.copier.slot(size, self.device) for _ in self.schedule.held]
        if self.current is not None:
            self.copier.release(self.slots[self.current])
        for slot, wanted in self.schedule.visit(unit, returns=returns):
            self.copier.copy(self.slots[slot], self.masters[wanted].buffer)
        self.current = self.schedule.held.index(unit)
        slot = self.slots[self.current]
        self.copier.wait(slot)
        return self.masters[unit].views(slot.buffer)

    @torch.no_grad()
    def store(self, unit: int, name: str) -> None:
        """A tensor of the unit that is in use was changed: copy it back to the master."""
        if self.current is None or self.schedule.held[self.current] != unit:
            raise ValueError("only the unit that is in use is copied back")
        entry, master = self.masters[unit].entries[name], self.masters[unit].buffer
        self.copier.store(self.slots[self.current], entry.start, entry.stop, master[entry.start : entry.stop])

    def forget(self) -> None:
        """Masters are read or changed from now on: everything is stored, and slots hold nothing."""
        self.copier.settle()
        self.schedule.held = [None] * len(self.schedule.held)
        self.schedule.last = None

    def drop(self) -> None:
        """Let the slots' memory go until the next use."""
        for slot in self.slots:
            self.copier.wait(slot)  # what is still on its way must not land in memory that is given to others
        self.slots, self.current = [], None
        self.schedule.held = [None] * len(self.schedule.held)
        self.schedule.last = None
