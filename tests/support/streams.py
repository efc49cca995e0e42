"""Inputs for the tiny transformer, and hooks that touch its stream."""

from collections.abc import Callable

import torch
from tiny_run import HEAD, HIDDEN, TEXT
from torch import Tensor

from fluxsmith.models.packing import image_ids, text_ids
from fluxsmith.models.stream import BlockHook, IpTokens, Stream, Tokens

HEADS = HIDDEN // HEAD


def tokens(seed: int = 0, *, cells: int = 4, text: int = 5, batch: int = 2) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    img = torch.randn(batch, cells * cells // 4, 64, generator=generator)
    txt = torch.randn(batch, text, TEXT, generator=generator)
    y = torch.randn(batch, TEXT, generator=generator)
    t = torch.rand(batch, generator=generator)
    return Tokens(img, image_ids(batch, cells, cells), txt, text_ids(batch, text), y, t, torch.full((batch,), 2.5))


class Noting(BlockHook):
    """Writes down when it is called."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def before(self, index: int, stream: Stream) -> Stream:
        self.calls.append(f"{self.name} before {index}")
        return stream

    def after(self, index: int, stream: Stream) -> Stream:
        self.calls.append(f"{self.name} after {index}")
        return stream


class At(BlockHook):
    """Changes the stream before one block."""

    def __init__(self, index: int, change: Callable[[Stream], Stream]) -> None:
        self.index, self.change = index, change

    def before(self, index: int, stream: Stream) -> Stream:
        return self.change(stream) if index == self.index else stream


class Residual(BlockHook):
    """Adds a scaled tensor to the image stream after every block, as a ControlNet does."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def after(self, index: int, stream: Stream) -> Stream:
        return stream._replace(img=stream.img + self.scale * torch.ones_like(stream.img))


def extra_keys(scale: float, *, after_block: bool) -> IpTokens:
    generator = torch.Generator().manual_seed(9)
    key, value = torch.randn(2, 2, HEADS, 3, HEAD, generator=generator)
    return IpTokens(key, value, torch.tensor(scale), after_block)
