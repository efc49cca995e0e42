"""Draws keyed by (seed, purpose, keys): there is no hidden random state in data, noise or captions.

The same key always gives the same draw, whatever was drawn before and in whichever process, so a run
can be cut and continued anywhere: `generator(42, "noise", sample_index, micro_step)`.
"""

import hashlib
import random

import torch

Key = int | str


def seed_for(seed: int, purpose: str, *keys: Key) -> int:
    """A 63-bit seed for one purpose; purposes in use: order, flip, crop, caption, timestep, noise, dropout, preview."""
    text = "\x1f".join([str(seed), purpose, *map(str, keys)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *keys: Key) -> torch.Generator:
    """A CPU torch generator: draws are made on the host so that every device sees the same numbers."""
    return torch.Generator().manual_seed(seed_for(seed, purpose, *keys))


def seed_device(device: torch.device, seed: int) -> None:
    """Seed what draws without a generator of its own (dropout, stochastic rounding) on this device.

    torch.manual_seed does it for every back-end that was ever compiled in, with a stack trace each: a millisecond a call.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    torch.default_generator.manual_seed(seed)


def python_random(seed: int, purpose: str, *keys: Key) -> random.Random:
    """A Python generator for choices and shuffles (captions, order)."""
    return random.Random(seed_for(seed, purpose, *keys))  # noqa: S311  no secret is drawn here


def permutation(count: int, seed: int, purpose: str, *keys: Key) -> list[int]:
    """A permutation of range(count), fixed by its key."""
    order = list(range(count))
    python_random(seed, purpose, *keys).shuffle(order)
    return order
