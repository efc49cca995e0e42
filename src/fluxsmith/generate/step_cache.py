"""Step caches: neighbouring steps change the transformer's blocks little, so a step may reuse what they added before (seam 4).

TeaCache (Liu et al. 2024) watches the modulated input of the first block, the first-block cache (ParaAttention) what the first block
adds. Every branch of guidance has a state of its own, made anew for every picture. The first and the last level always compute.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from fluxsmith.errors import Problem
from fluxsmith.models.assembly import Predictor
from fluxsmith.models.blocks import DoubleStreamBlock, SingleStreamBlock
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.layers import modulate
from fluxsmith.models.stream import BlockHook, Stream, Tokens

POLYNOMIAL = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)  # fitted on FLUX.1-dev by TeaCache's authors, x^4 first


class Rule(Protocol):
    """When the blocks may be left out; keeps what it compares with."""

    blocks: int  # that run before it can tell

    def probe(self, dit: FluxDiT, embedded: Stream, entered: Stream) -> Tensor:
        """What it watches, from the stream before block 0 and that after the first `blocks` blocks."""
        ...

    def skips(self, probe: Tensor, *, must_compute: bool) -> bool:
        """Decide about one forward and remember it."""
        ...


class TeaCache:
    """Sums rescaled relative changes of the first block's modulated image input until they reach the threshold.

    The polynomial is nowhere below 0.18, so that smaller thresholds skip nothing.
    """

    blocks = 0

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.accumulated = 0.0
        self.previous: Tensor | None = None

    def probe(self, dit: FluxDiT, embedded: Stream, entered: Stream) -> Tensor:
        """The normed image tokens under block 0's first shift and scale."""
        block = dit.blocks[0]
        if not isinstance(block, DoubleStreamBlock | SingleStreamBlock):
            raise TypeError(f"{type(block).__name__} is no block of FLUX")
        first = block.modulations(embedded.vec, dit.run_modulation)[0]
        return modulate(embedded.img, first.shift, first.scale)

    def skips(self, probe: Tensor, *, must_compute: bool) -> bool:
        """The last probe is that of the step before, computed or not."""
        previous, self.previous = self.previous, probe
        if must_compute or previous is None:
            self.accumulated = 0.0
            return False
        self.accumulated += rescaled(relative_change(probe, previous))
        if self.accumulated < self.threshold:
            return True
        self.accumulated = 0.0
        return False


class FirstBlock:
    """Compares what block 0 adds to the image with what it added when the others were last computed."""

    blocks = 1

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.computed: Tensor | None = None

    def probe(self, dit: FluxDiT, embedded: Stream, entered: Stream) -> Tensor:
        """Block 0's residual on the image tokens, with what hooks added there."""
        return entered.img - embedded.img

    def skips(self, probe: Tensor, *, must_compute: bool) -> bool:
        """Below the threshold the rest is left out."""
        if not must_compute and self.computed is not None and relative_change(probe, self.computed) < self.threshold:
            return True
        self.computed = probe
        return False


STEP_CACHES = {"teacache": TeaCache, "first_block": FirstBlock}


class CachedDiT:
    """A transformer behind a step cache, for one branch of guidance of one picture. `skipped` says what happened to each forward.

    What hooks did inside the blocks (a ControlNet's residuals) is part of what is reused. Where other kinds of hooks come, or tokens
    of another shape, the blocks are computed. `last` is the level (float) that is always computed.
    """

    def __init__(self, dit: FluxDiT, rule: Rule, *, last: float = 0.0) -> None:
        self.dit = dit
        self.rule = rule
        self.last = last
        self.params = dit.params
        self.visible_padding = dit.visible_padding
        self.skipped: list[bool] = []
        self.residual: Tensor | None = None
        self.situation: tuple[object, ...] = ()

    def __call__(self, tokens: Tokens, hooks: Sequence[BlockHook] = ()) -> Tensor:
        """As FluxDiT: velocity of the target tokens (B, n_target, out_channels). For inference: the residual is kept without gradient."""
        dit, rule = self.dit, self.rule
        embedded = dit.embed(tokens)
        entered = dit.run_blocks(embedded, hooks, 0, rule.blocks) if rule.blocks else embedded
        situation = (embedded.img.shape, embedded.txt.shape, *(type(hook) for hook in hooks))
        must_compute = self.residual is None or situation != self.situation or float(tokens.t.min()) <= self.last
        skips = rule.skips(rule.probe(dit, embedded, entered).detach(), must_compute=must_compute)
        self.situation = situation
        self.skipped.append(skips)
        if skips and self.residual is not None:
            return dit.head(entered._replace(img=entered.img + self.residual))
        left = dit.run_blocks(entered, hooks, rule.blocks)
        self.residual = (left.img - entered.img).detach()
        return dit.head(left)


class StepCaches:
    """The step caches of one picture, one for each branch; none where the option (`Request.cache`) is None."""

    def __init__(self, option: Mapping[str, Any] | None) -> None:
        self.option = option
        self.branches: list[CachedDiT] = []

    def around(self, dit: FluxDiT, *, last: float) -> Predictor:
        """The transformer for a further branch."""
        if self.option is None:
            return dit
        self.branches.append(CachedDiT(dit, STEP_CACHES[self.option["type"]](self.option["threshold"]), last=last))
        return self.branches[-1]

    def note(self) -> dict[str, int]:
        """Forwards of the transformer and how many of them left the blocks out; empty without a cache."""
        if self.option is None:
            return {}
        return {"forwards": sum(len(b.skipped) for b in self.branches), "forwards_skipped": sum(sum(b.skipped) for b in self.branches)}


def relative_change(now: Tensor, before: Tensor) -> float:
    """mean |now - before| / mean |before|, in fp32; NaN or infinite where `before` is zero, which skips nothing."""
    now, before = now.float(), before.float()
    return ((now - before).abs().mean() / before.abs().mean()).item()


def rescaled(change: float) -> float:
    """TeaCache's estimate of how much the output changes."""
    value = 0.0
    for coefficient in POLYNOMIAL:
        value = value * change + coefficient  # overflows to infinity, where a power would raise
    return value


def option_problems(option: Mapping[str, Any] | None) -> Iterator[Problem]:
    """What is wrong with `{"type": "teacache", "threshold": 0.4}`."""
    if option is None:
        return
    example = 'write {"type": "teacache", "threshold": 0.4}'
    if set(option) != {"type", "threshold"}:
        yield Problem(f"cache = {dict(option)}", why="a step cache has a type and a threshold", fix=example)
        return
    name, threshold = option["type"], option["threshold"]
    if name not in STEP_CACHES:
        yield Problem(f"cache type = {name}", why="there is no such step cache", fix=f"use one of {', '.join(STEP_CACHES)}")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not (threshold >= 0 and math.isfinite(threshold)):
        yield Problem(f"cache threshold = {threshold}", why="it must be 0 or more", fix=example)
