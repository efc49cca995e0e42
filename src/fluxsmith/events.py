"""What happens in a run, as frozen dataclasses, and the Bus that hands them to listeners (sinks).

A sink that fails is switched off and reported; it never ends a run.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """Base of all events; `kind` is the class name in the written record."""

    time: float = field(default_factory=time.time, kw_only=True)

    def as_record(self) -> dict[str, Any]:
        """A JSON-ready dict; paths become strings."""
        return {"event": type(self).__name__, **{k: _plain(v) for k, v in asdict(self).items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


@dataclass(frozen=True)
class RunStarted(Event):
    """The run folder is locked, the parts are built and the first step is near."""

    run_dir: str
    total_steps: int
    start_step: int
    config: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)  # device, threads, versions, counts


@dataclass(frozen=True)
class PhaseStarted(Event):
    """Loading, caching, dry step, training, saving: what the run is busy with now."""

    name: str
    detail: str = ""


@dataclass(frozen=True)
class CacheProgress(Event):
    """Latents or text states being encoded."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class StepEnded(Event):
    """One optimizer step."""

    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float
    peak_bytes: int = 0
    extras: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ValidationEnded(Event):
    """Loss on held-out samples at fixed times and noise."""

    step: int
    loss: float
    by_timestep: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleReady(Event):
    """A picture was made while training; step 0 is the picture before training."""

    step: int
    index: int
    prompt: str
    path: str
    seconds: float = 0.0


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A resumable state is complete on disk."""

    step: int
    path: str
    seconds: float = 0.0


@dataclass(frozen=True)
class WeightsSaved(Event):
    """A weights file for use elsewhere, with the verdict on where it loads."""

    step: int
    path: str
    verdict: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Warned(Event):
    """Something the user should know that did not stop the run."""

    message: str


@dataclass(frozen=True)
class RunEnded(Event):
    """All steps are done, or the run stopped on request with a checkpoint."""

    step: int
    stopped: bool
    seconds: float
    weights: str = ""


@dataclass(frozen=True)
class RunFailed(Event):
    """The run ended with an error; `exit_code` as in docs/reference/exit-codes.md."""

    step: int
    kind: str
    message: str
    exit_code: int


Sink = Callable[[Event], None]


class Bus:
    """Delivers events to sinks in order; `send` never raises because of a sink."""

    def __init__(self, *sinks: Sink) -> None:
        self.sinks: list[Sink] = list(sinks)
        self.failed: dict[str, str] = {}

    def send(self, event: Event) -> None:
        """Hand the event to every live sink; a sink that raises is switched off and the others are told."""
        for sink in tuple(self.sinks):
            try:
                sink(event)
            except Exception as error:  # noqa: BLE001  whatever a tracker does, training goes on
                self._switch_off(sink, error)

    def _switch_off(self, sink: Sink, error: Exception) -> None:
        self.sinks.remove(sink)
        name = getattr(sink, "name", None) or type(sink).__name__
        self.failed[name] = f"{type(error).__name__}: {error}"
        self.send(Warned(f"{name} was switched off: {self.failed[name]}"))
