"""The part of a schedule in which a control acts: from `start` to `end` of its steps, 0 being the first step and 1 the last."""

from typing import NamedTuple

ROUNDING = 1e-6  # noise levels come back from samplers through other types


class Span(NamedTuple):
    """Noise levels of a schedule (the last is 0), and the part of its steps that is meant, both ends included."""

    levels: tuple[float, ...] = ()
    start: float = 0.0
    end: float = 1.0

    def covers(self, sigma: float) -> bool:
        """Does the control act in the step that this level belongs to? A single step is the last one."""
        last = len(self.levels) - 2
        if last < 0:
            return True
        step = min(max(sum(level > sigma - ROUNDING for level in self.levels) - 1, 0), last)  # one between two levels is the earlier's
        place = step / last if last else 1.0
        return self.start - ROUNDING <= place <= self.end + ROUNDING


ALWAYS = Span()
