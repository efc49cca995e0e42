"""Activation checkpointing: recompute a block in backward instead of keeping what it saved (Chen et al. 2016)."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fluxsmith.models.flux import FluxDiT


def checkpoint_blocks(dit: FluxDiT) -> None:
    """Recompute every block of `dit` in backward; results and gradients stay the same bits."""
    dit.call = _recomputed


def _recomputed(block: nn.Module, *inputs: object) -> tuple[Tensor, Tensor]:
    return checkpoint(block, *inputs, use_reentrant=False)
