"""Activation checkpointing, block by block: recompute in backward instead of keeping what a block saved (Chen et al. 2016).

Four modes: keep all; selective (keep products with base weights and attention, recompute the cheap steps between); boundary (keep the
streams that enter the block); offloaded (these streams wait in host memory). Results and gradients are the same bits in each.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fluxsmith.config.memory import MemoryConfig
from fluxsmith.errors import ConfigError
from fluxsmith.memory.host_ring import HostRing
from fluxsmith.models.blocks import SingleStreamBlock
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.linear import Linear

Call = Callable[..., tuple[Tensor, Tensor]]
Mode = Literal["keep", "selective", "boundary", "offloaded"]
PRODUCTS = ("mm", "addmm")
ATTENTION = "scaled_dot_product"


def checkpoint_blocks(dit: FluxDiT, modes: Sequence[Mode] | None = None, *, offload: bool = False) -> None:
    """Let every block of `dit` do what its mode says: all "boundary" by default, or "offloaded". Wraps what `dit.call` does already."""
    run: Call = dit.call
    blocks = dit.blocks
    default: Mode = "offloaded" if offload else "boundary"
    chosen: Sequence[Mode] = modes or [default for _ in blocks]
    by_block: dict[nn.Module, Mode] = dict(zip(blocks, chosen, strict=True))
    single, double = (partial(_contexts, dit.params.hidden_size, single=is_single) for is_single in (True, False))
    ring = HostRing()
    for block, mode in by_block.items():  # what these keep is made again for their own backward pass, and gone after it
        for module in block.modules():
            if isinstance(module, Linear):
                module.is_recomputed = mode in ("boundary", "offloaded")

    def call(block: nn.Module, img: Tensor, txt: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        mode = by_block[block]
        if mode == "keep" or not torch.is_grad_enabled():
            return run(block, img, txt, *rest)
        if mode == "selective":
            context = single if isinstance(block, SingleStreamBlock) else double
            return checkpoint(run, block, img, txt, *rest, use_reentrant=False, context_fn=context)
        if mode == "boundary":
            return checkpoint(run, block, img, txt, *rest, use_reentrant=False)
        with saved_tensors_hooks(ring.keeper(img, txt), ring.fetch):
            return checkpoint(run, block, img, txt, *rest, use_reentrant=False)

    dit.call = call


def modes_of(memory: MemoryConfig, depth: int, depth_single: int) -> list[Mode]:
    """The mode of each block. Raises ConfigError for numbers of blocks that the model does not have.

    Kept blocks are the last ones, whose memory is free first in backward; offloaded ones the first, whose streams have most time to
    travel. With an interval every n-th block of each stack is recomputed.
    """
    total = depth + depth_single
    if not memory.checkpointing:
        return ["keep"] * total
    rest: Mode = "offloaded" if memory.checkpointing_offload else "boundary"
    plan = memory.checkpointing_plan
    if plan is not None:
        if plan.keep + plan.selective + plan.offloaded > total:
            why = f"{plan.keep} kept, {plan.selective} selective and {plan.offloaded} offloaded of {total} blocks"
            raise ConfigError("memory.checkpointing_plan has more blocks than the model", why=why, fix="lower its numbers")
        plain = total - plan.keep - plan.selective - plan.offloaded
        counts: list[tuple[Mode, int]] = [("offloaded", plan.offloaded), (rest, plain), ("selective", plan.selective), ("keep", plan.keep)]
        return [mode for mode, count in counts for _ in range(count)]
    places = [*range(depth), *range(depth_single)]
    return [rest if place % memory.checkpointing_interval == 0 else "keep" for place in places]


def _contexts(hidden: int, *, single: bool) -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(partial(_policy, hidden, single))


def _policy(hidden: int, single: bool, ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep attention and products with base weights: a low-rank pair's are narrower than the model. What leaves a block is not read."""
    name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else ""
    if ATTENTION in name and "backward" not in name:
        return CheckpointPolicy.MUST_SAVE
    if name in PRODUCTS:
        inner, outer = args[-1].shape
        if min(inner, outer) >= hidden and not (single and outer == hidden):
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
