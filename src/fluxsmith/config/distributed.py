"""Section `distributed`: what several cards share among them."""

from pathlib import Path
from typing import Literal

from fluxsmith.config.section import Section


class DistributedConfig(Section):
    """One model over several cards (FSDP2); without it each card holds all of it."""

    shard: Literal["none", "grads", "full"] = "none"
    """none: each card holds the whole model. full: a share of weights, gradients and optimizer state, blocks are put together while they
    compute (ZeRO-3). grads: the same, but weights stay whole between forward and backward (ZeRO-2)."""
    cpu_offload: bool = False
    """Shares wait in host memory and are updated there; with one card as `memory.optimizer_offload`."""
    gather: Literal["weights", "bf16"] = "weights"
    """Type in which weights travel between cards: their own, or bf16 (half of fp32), which needs `train.precision = "bf16"`."""
    reduce: Literal["fp32", "weights"] = "fp32"
    """Type in which gradients are added up over cards."""
    checkpoint: Literal["sharded", "full"] = "sharded"
    """States of one file a card, written by all at once, or of one file, put together by the first; any number of cards reads either."""
    config: Path | None = None
    """A config of accelerate (YAML, JSON) or DeepSpeed (JSON): what it asks for fills what the run file leaves open."""
