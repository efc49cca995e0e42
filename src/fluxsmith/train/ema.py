"""A running average of the trained weights in fp32 (Polyak & Juditsky 1992), with a warmed-up decay."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Shadow copies by name; `shadow` is what is saved and restored."""

    def __init__(self, params: Mapping[str, nn.Parameter], decay: float) -> None:
        self.params = params
        self.decay = decay
        self.shadow: dict[str, Tensor] = {name: param.detach().clone().float() for name, param in params.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """shadow += (1 - d)(weight - shadow) with d = min(decay, (1 + step) / (10 + step))."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, param in self.params.items():
            self.shadow[name].lerp_(param.detach().float(), share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averaged weights in the model's place; the trained ones come back bit for bit."""
        kept = {name: param.detach().clone() for name, param in self.params.items()}
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(self.shadow[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, param in self.params.items():
                    param.copy_(kept[name])
