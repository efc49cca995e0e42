"""Where a run is: optimizer steps, epochs and micro-batches, all computed from the step number alone.

Micro-batches of all epochs form one endless row. Step k uses micro-batches k*A*W .. (k+1)*A*W - 1 (accumulation A,
W processes); process r takes those whose number is r modulo W. So the step number is the whole data position.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil

from fluxsmith.data.types import BatchSpec


@dataclass
class BatchPlan:
    """`batches(epoch)` is a pure function; the last epoch asked for is kept."""

    batches: Callable[[int], Sequence[BatchSpec]]
    accumulation: int
    world_size: int = 1
    _epoch: int = field(default=-1, repr=False)
    _specs: Sequence[BatchSpec] = field(default=(), repr=False)
    per_epoch: int = 0

    def __post_init__(self) -> None:
        self.per_epoch = len(self._of(0))

    @property
    def per_step(self) -> int:
        """Micro-batches in one optimizer step, over all processes."""
        return self.accumulation * self.world_size

    def total_steps(self, steps: int | None, epochs: int | None) -> int:
        """Length of the run in optimizer steps."""
        return steps if steps is not None else ceil((epochs or 1) * self.per_epoch / self.per_step)

    def epoch_of(self, step: int) -> int:
        """Epoch (from 0) in which optimizer step `step` begins."""
        return step * self.per_step // self.per_epoch

    def epochs_done(self, finished: int) -> int:
        """Whole epochs in `finished` optimizer steps."""
        return finished * self.per_step // self.per_epoch

    def is_epoch_due(self, finished: int, every: int) -> bool:
        """True if the last of `finished` steps completed a multiple of `every` epochs (a step can complete several); never for 0."""
        return every > 0 and self.epochs_done(finished) // every > self.epochs_done(finished - 1) // every

    def micro_batches(self, step: int, rank: int = 0) -> list[tuple[int, BatchSpec]]:
        """(number, spec) of this process's micro-batches of optimizer step `step`."""
        first = step * self.per_step
        numbers = range(first + rank, first + self.per_step, self.world_size)
        return [(number, self._of(number // self.per_epoch)[number % self.per_epoch]) for number in numbers]

    def _of(self, epoch: int) -> Sequence[BatchSpec]:
        if epoch != self._epoch:
            self._epoch, self._specs = epoch, self.batches(epoch)
        return self._specs
