"""Activation checkpointing: recompute a block in backward instead of keeping what it saved (Chen et al. 2016)."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fluxsmith.models.flux import FluxDiT

Call = Callable[..., tuple[Tensor, Tensor]]


def checkpoint_blocks(dit: FluxDiT, *, offload: bool = False) -> None:
    """Recompute every block of `dit` in backward; results and gradients stay the same bits.

    With `offload` the streams that enter a block wait in host memory until then. Wraps what `dit.call` does already.
    """
    run: Call = dit.call

    def recomputed(block: nn.Module, *inputs: object) -> tuple[Tensor, Tensor]:
        return checkpoint(run, block, *inputs, use_reentrant=False)

    def offloaded(block: nn.Module, img: Tensor, txt: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        device = img.device

        def fetched(img: Tensor, txt: Tensor) -> tuple[Tensor, Tensor]:
            return run(block, img.to(device, non_blocking=True), txt.to(device, non_blocking=True), *rest)

        return checkpoint(fetched, img.cpu(), txt.cpu(), use_reentrant=False)

    dit.call = offloaded if offload else recomputed
