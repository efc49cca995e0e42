"""Streams of recomputed blocks that wait on the host: the same gradients, and nothing on the device but the last stream."""

import torch
from small_dit import dit, tokens

from fluxsmith.memory.checkpoint import checkpoint_blocks


def test_gradients_are_the_same_bits() -> None:
    grads = []
    for mode in (None, False, True):
        model, img = dit(), tokens().img.clone().requires_grad_()
        if mode is not None:
            checkpoint_blocks(model, offload=mode)
        model(tokens()._replace(img=img)).square().mean().backward()
        assert img.grad is not None
        grads.append(img.grad)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_only_the_offloading_call_sends_streams_to_the_host() -> None:
    """Counted through a stream whose `cpu` is watched: twice a block, image and text."""

    class Watched(torch.Tensor):
        moved = 0

        def cpu(self, *args: object, **kwargs: object) -> torch.Tensor:
            Watched.moved += 1
            return super().cpu(*args, **kwargs)

    model = dit()
    checkpoint_blocks(model, offload=True)
    model(tokens()._replace(img=tokens().img.as_subclass(Watched)))
    assert Watched.moved >= len(model.blocks)
