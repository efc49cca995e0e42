"""How long a step takes at best: FLOPs of a forward pass and of a step, what cards can do, and what limits a run.

Formulas: docs/explanation/memory.md. A model FLOP is counted once, so a recomputed one is not; recomputation is the `again` of `Work`.
"""

from typing import NamedTuple

from fluxsmith.memory.sizes import Counts

SHARE = 0.7  # of a card's peak that large products reach


class Card(NamedTuple):
    """Dense TFLOP/s in 16 and 8 bits, and GB/s from the host."""

    tflops: float
    tflops_8bit: float
    bus: float = 25.0


CARDS = {
    "H200": Card(790, 1500, 55.0),  # products measured on random data; eight bits as published
    "RTX 4090": Card(165, 330),
    "RTX 3090": Card(71, 284),
}


class Work(NamedTuple):
    """FLOPs of one optimizer step on one batch."""

    model: float
    """What the step is about: forward, gradients of inputs, and of weights where they are trained."""
    again: float
    """Forward work that is done once more."""

    @property
    def total(self) -> float:
        """All that is executed."""
        return self.model + self.again


def linear_flops(counts: Counts, tokens: int, *, channels: int = 64) -> float:
    """Of the products of one sample's forward pass with weights; both kinds of block cost a token the same."""
    h, mlp = counts.hidden, counts.mlp
    return 2.0 * tokens * (len(counts.blocks) * (4 * h * h + 2 * h * mlp) + 2 * channels * h)


def attention_flops(counts: Counts, tokens: int) -> float:
    """Of one sample's forward pass."""
    return 4.0 * counts.hidden * tokens**2 * len(counts.blocks)


def forward_flops(counts: Counts, tokens: int) -> float:
    """Of one sample: products with weights and attention; what is computed once a sample instead of once a token is left out."""
    return linear_flops(counts, tokens) + attention_flops(counts, tokens)


def step_work(counts: Counts, tokens: int, batch: int, *, trains_base: bool, recomputed: float = 0.0) -> Work:
    """Of one step: adapters need the gradient of inputs alone (twice the products), a full fine-tune that of weights too.

    Attention counts three times. `recomputed` is the share of blocks whose forward is done once more.
    """
    linear, attention = linear_flops(counts, tokens), attention_flops(counts, tokens)
    model = batch * ((3 if trains_base else 2) * linear + 3 * attention)
    return Work(model, batch * recomputed * (linear + attention))


def card_named(name: str) -> Card | None:
    """Figures of a card by what its driver calls it; None for one that is not in the table."""
    plain = name.upper().replace("GEFORCE ", "")
    return next((card for part, card in CARDS.items() if part in plain), None)


def ceiling(card: Card, quant: str) -> float:
    """FLOP/s that products reach at best, by how the base is stored: 4 bits are unpacked and multiplied in 16."""
    return 1e12 * (card.tflops_8bit if quant in ("fp8", "int8") else card.tflops)


class Rate(NamedTuple):
    """Predicted time of a step."""

    seconds: float
    compute: float
    """Seconds of computing."""
    transfer: float
    """Seconds of copies from and to the host, which run beside it."""

    @property
    def kind(self) -> str:
        """What limits it."""
        if self.transfer > self.compute:
            return "transfer-bound" if self.transfer < 2 * self.compute else "slow: mostly waiting for the bus"
        return "compute-bound"


def rate(work: Work, card: Card, quant: str, moved: float) -> Rate:
    """The larger of computing at `SHARE` of the peak and moving so many bytes over the bus."""
    compute, transfer = work.total / (SHARE * ceiling(card, quant)), moved / (card.bus * 1e9)
    return Rate(max(compute, transfer), compute, transfer)


def moved_bytes(streamed: int, total: float, boundaries: float) -> float:
    """Over the bus in a step: of n streamed blocks (together `total` bytes) the turning points stay, so 2 (n - 2) travel; and inputs of
    recomputed blocks that wait on the host go and come."""
    travels = 2 * total * max(0, streamed - 2) / streamed if streamed else 0.0
    return travels + 2 * boundaries
