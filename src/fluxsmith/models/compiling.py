"""Compiled blocks: one graph for each kind of block, adapters inside, hooks and modulations outside (docs/explanation/speed.md)."""

from collections.abc import Callable
from typing import Any

import torch

from fluxsmith.models.flux import FluxDiT

VARIANTS = 64  # graphs of one kind of block: lengths, extra keys, with and without gradient; torch gives up at 8 and says nothing
DYNAMIC = {"auto": None, "static": False, "dynamic": True}


def compile_blocks(dit: FluxDiT, lengths: str = "auto", *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile every block in place; the work is done at the first calls.

    `lengths` of the token sequences: `static` makes graphs for each, `dynamic` one set for all, `auto` begins with the first length and
    makes one set for all others when a second one comes.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for block in dit.blocks:
        block.compile(dynamic=DYNAMIC[lengths], backend=backend)
