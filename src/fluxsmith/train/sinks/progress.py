"""The run on a terminal: a bar with loss, rate and time left; plain lines where there is no terminal."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fluxsmith.events import (
    CacheProgress,
    CheckpointSaved,
    Event,
    PhaseStarted,
    RunEnded,
    RunFailed,
    RunStarted,
    SampleReady,
    StepEnded,
    ValidationEnded,
    Warned,
    WeightsSaved,
)

LINES = 20  # plain lines for a whole run without a terminal
QUIET_SECONDS = 10.0  # between two plain lines about a cache that is being filled


class ProgressSink:
    """Human view on stderr; results go to stdout by the command."""

    name = "progress"

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.total = 0
        self.rate = 0.0
        self.said = time.time()  # when a line about the caches was last written
        self.is_first = True  # step of this session: its line shows soon that the run is alive

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, StepEnded):
            self._step(event)
        elif isinstance(event, RunStarted):
            self._start(event)
        elif isinstance(event, CacheProgress):
            self._cache(event)
        elif isinstance(event, RunEnded):
            self.close()
            self._say(f"{'stopped' if event.stopped else 'done'} at step {event.step} after {duration(event.seconds)}")
        elif isinstance(event, RunFailed):
            self.close()  # the command prints the message
        else:
            line = describe(event)
            if line:
                self._say(line)

    def _start(self, event: RunStarted) -> None:
        self.total = event.total_steps
        self._say(f"run {event.run_dir}: steps {event.start_step} to {event.total_steps}")
        if self.console.is_terminal:
            self._open("train", event.total_steps, event.start_step)

    def _open(self, name: str, total: int, done: int) -> None:
        self.close()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console)
        self.task = self.bar.add_task(name, total=total, completed=done)
        self.bar.start()

    def _cache(self, event: CacheProgress) -> None:
        """A bar of its own, or a line from time to time."""
        if self.console.is_terminal and event.done < event.total:
            if self.bar is None:
                self._open(event.what, event.total, event.done)
            if self.bar is not None and self.task is not None:
                self.bar.update(self.task, completed=event.done)
            return
        if event.done == event.total:
            self.close()
        if event.done == event.total or event.time - self.said >= QUIET_SECONDS:
            self._say(f"{event.what}: {event.done} of {event.total}")
            self.said = event.time

    def _step(self, event: StepEnded) -> None:
        rate = 1 / max(event.seconds, 1e-9)
        self.rate = rate if not self.rate else 0.95 * self.rate + 0.05 * rate
        text = f"loss {event.loss:.4f}  lr {event.lr:.2e}  {self.rate:.2f} steps/s"
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=event.step, description=text)
        elif self.is_first or event.step % max(1, self.total // LINES) == 0 or event.step == self.total:
            self._say(f"step {event.step}/{self.total}  {text}  {duration((self.total - event.step) / self.rate)} left")
        self.is_first = False

    def close(self) -> None:
        """Take the bar away; lines go on."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """8.24 -> "8 s", 754 -> "12 min 34 s", 9000 -> "2 h 30 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def describe(event: Event) -> str:
    """One line about an event that is no step; empty for events that need none."""
    match event:
        case PhaseStarted():
            return f"{event.name}: {event.detail}"
        case Warned():
            return f"warning: {event.message}"
        case CheckpointSaved():
            return f"state saved: {event.path}"
        case WeightsSaved():
            return f"weights saved: {event.path}" + (f" ({event.verdict['line']})" if "line" in event.verdict else "")
        case SampleReady():
            return f"sample: {event.path}"
        case ValidationEnded():
            return f"validation loss at step {event.step}: {event.loss:.4f}"
    return ""
