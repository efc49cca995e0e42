"""Which unit is in which slot when, what is copied, and what waits for what: the logic alone, with a copier that writes everything down."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fluxsmith.memory.masters import Host, Master
from fluxsmith.memory.slots import Copier, Lane, Schedule, Slot

CPU = torch.device("cpu")


def journey(units: int) -> list[int]:
    """Uses in a training step: forward, then backward, the last unit at once again."""
    return [*range(units), *reversed(range(units))]


def steps(schedule: Schedule, count: int) -> list[int]:
    """Copies in each of `count` training steps."""
    return [sum(len(schedule.visit(unit, returns=True)) for unit in journey(schedule.units)) for _ in range(count)]


@pytest.mark.ledger("KS-22")
@pytest.mark.parametrize(("units", "slots"), [(5, 2), (5, 3), (57, 2), (57, 3), (3, 3), (1, 2), (2, 2)])
def test_units_at_the_turning_points_stay(units: int, slots: int) -> None:
    """The first step copies every unit once forwards; later steps find the first units where backward left them."""
    first, second, third = steps(Schedule(units, slots), 3)
    kept = min(units, slots)
    assert first == units + (units - kept)
    assert second == third == 2 * (units - kept)


def test_a_unit_that_is_used_is_there_and_the_next_one_is_on_its_way() -> None:
    schedule = Schedule(6, 2)
    for place, unit in enumerate(uses := journey(6)):
        schedule.visit(unit, returns=True)
        assert unit in schedule.held
        if place + 1 < len(uses):
            assert uses[place + 1] in schedule.held


@pytest.mark.ledger("DS-08")
def test_without_a_way_back_the_first_follows_the_last() -> None:
    schedule = Schedule(4, 2)
    copies = [schedule.visit(unit, returns=False) for _ in range(3) for unit in range(4)]
    assert [len(loads) for loads in copies] == [2] + [1] * 11
    assert copies[3][0].unit == 0


def test_without_prefetch_nothing_comes_before_it_is_used() -> None:
    schedule = Schedule(4, 1, prefetch=False)
    assert [[load.unit for load in schedule.visit(unit, returns=True)] for unit in journey(4)] == [[0], [1], [2], [3], [], [2], [1], [0]]


class Diary(Copier):
    """Writes down what happens, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.slots: list[Slot] = []

    def slot(self, size: int, device: torch.device) -> Slot:
        self.slots.append(super().slot(size, device))
        return self.slots[-1]

    def number(self, slot: Slot) -> int:
        return next(i for i, own in enumerate(self.slots) if own is slot)

    def copy(self, slot: Slot, source: Tensor) -> None:
        assert source.data_ptr() not in [own.buffer.data_ptr() for own in self.slots], "nothing is copied back"
        self.lines.append(f"copy {int(source[0])} to {self.number(slot)}")
        super().copy(slot, source)

    def wait(self, slot: Slot) -> None:
        self.lines.append(f"wait {self.number(slot)}")

    def release(self, slot: Slot) -> None:
        self.lines.append(f"release {self.number(slot)}")


def masters(count: int) -> list[Master]:
    return [Master({"x": torch.full((3,), i, dtype=torch.uint8)}, Host()) for i in range(count)]


def test_a_slot_is_released_before_it_is_copied_into_and_waited_for_before_it_is_read() -> None:
    diary = Diary()
    lane = Lane(masters(3), CPU, Schedule(3, 2), diary)
    seen = [int(lane.bring(unit, returns=True)["x"][0]) for unit in journey(3)]
    assert seen == journey(3)
    assert diary.lines == [
        "copy 0 to 0", "copy 1 to 1", "wait 0",
        "release 0", "copy 2 to 0", "wait 1",
        "release 1", "wait 0",
        "release 0", "wait 0",
        "release 0", "copy 0 to 0", "wait 1",
        "release 1", "wait 0",
    ]  # fmt: skip
    assert lane.device_bytes == 6
    assert lane.host_bytes == 9


def test_slots_that_are_dropped_come_again() -> None:
    lane = Lane(masters(3), CPU, Schedule(3, 2))
    lane.bring(1)
    lane.drop()
    assert lane.slots == []
    assert int(lane.bring(2)["x"][0]) == 2


def test_tensors_of_all_types_share_one_buffer() -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7, dtype=torch.int8), "c": torch.tensor(2.5, dtype=torch.bfloat16)}
    master = Master(tensors, Host())
    views = master.views(master.buffer.clone())
    assert all(torch.equal(views[name], tensor) and views[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert all(view.storage_offset() * view.element_size() % 256 == 0 for view in views.values())
    assert len({view.untyped_storage().data_ptr() for view in views.values()}) == 1


def test_memory_that_cannot_be_pinned_is_said_once() -> None:
    said: list[str] = []

    def fails(tensor: Tensor) -> Tensor:
        raise RuntimeError("cannot lock\nmore lines")

    host = Host(pin=True, say=said.append, pinner=fails)
    assert [host.buffer(4).numel(), host.buffer(8).numel()] == [4, 8]
    assert said == ["host memory cannot be pinned (cannot lock): weights come slower, from pageable memory"]


@pytest.mark.ledger("ST-08")
def test_masters_on_disk_leave_no_files(tmp_path: Path) -> None:
    host = Host(disk=tmp_path / "masters")
    made = [Master({"x": torch.full((3,), i, dtype=torch.uint8)}, host) for i in range(2)]
    assert [int(master.buffer[0]) for master in made] == [0, 1]
    assert not [*(tmp_path / "masters").iterdir()]
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path) in maps.read_text()
