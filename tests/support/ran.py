"""What a run said and wrote, and comparisons of weights."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fluxsmith.errors import FluxsmithError
from fluxsmith.events import Event, Warned
from fluxsmith.io.safetensors import open_weights

E = TypeVar("E", bound=Event)


@dataclass
class Ran:
    """A run that has ended."""

    folder: Path
    events: list[Event] = field(default_factory=list)
    error: FluxsmithError | None = None

    def of(self, kind: type[E]) -> list[E]:
        """Its events of a kind."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def warnings(self) -> str:
        return "\n".join(event.message for event in self.of(Warned))

    @property
    def rows(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def losses(self) -> list[str]:
        return [row["loss_hex"] for row in self.rows]

    @property
    def states(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in (self.folder / "state").glob("step-*"))

    def tensors(self, step: int, kind: str = "weights") -> dict[str, Tensor]:
        """What a state holds."""
        with open_weights(self.folder / "state" / f"step-{step:06d}" / f"{kind}.safetensors") as weights:
            return {name: weights.tensor(name) for name in weights}

    @property
    def weights(self) -> dict[str, Tensor]:
        """Trained tensors of the newest state."""
        return self.tensors(self.states[-1])


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


Go = Callable[..., Ran]  # the fixture `go`
