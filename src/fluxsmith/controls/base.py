"""What controls are made of: a conditioner that changes nothing, and the hook that adds residuals after blocks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fluxsmith.models.stream import BlockHook, Stream, Tokens


class Unchanged:
    """A Conditioner that does nothing; controls override what they need."""

    def tokens(self, tokens: Tokens) -> Tokens:
        """As Conditioner.tokens."""
        return tokens

    def hooks(self, tokens: Tokens) -> Sequence[BlockHook]:
        """As Conditioner.hooks."""
        return ()


class ResidualHook(BlockHook):
    """Adds `residual(index)` (B, n_target, D) to the image stream after a block; None adds nothing."""

    def __init__(self, residual: Callable[[int], Tensor | None]) -> None:
        self.residual = residual

    def after(self, index: int, stream: Stream) -> Stream:
        """As BlockHook.after; tokens that other controls appended are left alone."""
        added = self.residual(index)
        if added is None:
            return stream
        rest = stream.img.shape[1] - added.shape[1]
        padded = torch.nn.functional.pad(added, (0, 0, 0, rest)) if rest else added
        return stream._replace(img=stream.img + padded.to(stream.img.dtype))
