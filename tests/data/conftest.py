"""A small folder of pictures with captions, counting stand-ins for the encoders, and `prepare` with a record of all events."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from fluxsmith.config.schema import CacheConfig
from fluxsmith.data.dataset import PreparedData, prepare
from fluxsmith.data.sources.folder import Config
from fluxsmith.data.types import Encoders, TextStates
from fluxsmith.events import Bus, Event, PhaseStarted, Warned

SIZES = [(100, 100), (160, 100), (100, 160), (120, 120), (200, 90), (96, 64)]


def write_picture(path: Path, size: tuple[int, int] = (96, 96), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    low = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(low).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def write_folder(folder: Path, count: int = 6, *, sizes: list[tuple[int, int]] | None = None) -> Path:
    """Pictures 00.png ... with captions `tag, picture N`."""
    for number in range(count):
        write_picture(folder / f"{number:02d}.png", (sizes or SIZES)[number % len(sizes or SIZES)], seed=number)
        (folder / f"{number:02d}.txt").write_text(f"tag, picture {number}")
    return folder


@dataclass
class CountingEncoders:
    """Encoders whose results depend on their input alone, and which remember what they were asked."""

    pictures: int = 0
    captions: list[str] = field(default_factory=list)
    digests: tuple[str, str] = ("ae-1", "text-1")

    def latents(self, pixels: Tensor) -> Tensor:
        self.pictures += len(pixels)
        return avg_pool2d(pixels, 8).mean(1, keepdim=True).repeat(1, 16, 1, 1)

    def text(self, captions: list[str]) -> TextStates:
        self.captions += captions
        rows = torch.tensor([[float(len(caption)), float(sum(map(ord, caption)))] for caption in captions])
        return TextStates(rows[:, None, :].repeat(1, 4, 1), rows, torch.ones(len(captions), 4, dtype=torch.bool))

    def as_encoders(self) -> Encoders:
        return Encoders(self.latents, self.digests[0], self.text, self.digests[1])


@dataclass
class Workshop:
    """Prepares data in a temporary folder."""

    root: Path
    encoders: CountingEncoders = field(default_factory=CountingEncoders)
    events: list[Event] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        return [event.message for event in self.events if isinstance(event, Warned)]

    @property
    def details(self) -> list[str]:
        return [event.detail for event in self.events if isinstance(event, PhaseStarted)]

    def config(self, folder: Path, **options: Any) -> Config:
        options = {"resolution": 64, "buckets": {"step": 16, "min": 32}} | options
        return Config(path=folder, **options)

    def prepare(self, *configs: Config, seed: int = 7, cache: dict[str, Any] | None = None) -> PreparedData:
        self.encoders.pictures, self.encoders.captions = 0, []
        self.events.clear()
        return prepare(
            configs,
            cache=CacheConfig(**(cache or {})),
            seed=seed,
            encoders=self.encoders.as_encoders(),
            bus=Bus(self.events.append),
            run_dir=self.root / "run",
        )


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@pytest.fixture
def picture() -> Callable[..., Path]:
    return write_picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures of five aspects."""
    return write_folder(tmp_path / "pictures")


@pytest.fixture
def make_folder() -> Callable[..., Path]:
    return write_folder
