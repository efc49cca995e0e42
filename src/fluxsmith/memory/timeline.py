"""One training step from beginning to end: which moment needs most, and of what.

Forward, every block adds what it holds; backward, block by block, what it held goes and its gradients come; then the optimizer.
"""

from typing import NamedTuple

from fluxsmith.memory.job import Job, cost, stream
from fluxsmith.memory.sizes import Counts

PIXEL = 4 * 3  # bytes a pixel and channel while the autoencoder works: three maps in fp32
LATENTS = 6  # tensors of a latent's size that live while a loss is computed


class Moment(NamedTuple):
    """Device bytes beyond weights and optimizer states."""

    held: float
    """By blocks, for the backward pass."""
    working: float
    """While one block (or the optimizer) works."""
    gradients: float
    """Of trained tensors."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.held + self.working + self.gradients


def modes(job: Job) -> list[str]:
    """Of each block: offloaded ones first, kept ones last."""
    plain = len(job.counts.blocks) - job.kept - job.selective - job.offloaded
    counts = (("offloaded", job.offloaded), ("boundary", plain), ("selective", job.selective), ("keep", job.kept))
    return [mode for mode, number in counts for _ in range(number)]


def block_costs(job: Job) -> list[tuple[float, float, float]]:
    """Held, forward peak, backward peak of each block; an offloaded one holds nothing and fetches its inputs again."""
    known = {(kind, mode): cost(job, kind, mode) for kind in kinds(job.counts) for mode in ("keep", "selective", "boundary")}
    made = []
    for index, mode in enumerate(modes(job)):
        held, forward, backward = known[kind_of(job.counts, index), "boundary" if mode == "offloaded" else mode]
        made.append((0.0, forward, backward + held) if mode == "offloaded" else (held, forward, backward))
    return made


def kinds(counts: Counts) -> list[str]:
    """Of the blocks that a model has."""
    return [*dict.fromkeys(kind_of(counts, index) for index in range(len(counts.blocks)))]


def kind_of(counts: Counts, index: int) -> str:
    """Double blocks come first; the last single one leaves the text alone."""
    if index < counts.depth:
        return "double"
    return "last" if index == len(counts.blocks) - 1 else "single"


def inputs(job: Job) -> float:
    """Embedded streams, rotary table and modulations, which the backward pass needs too."""
    tokens, c = job.batch * job.tokens, job.counts
    rows = 0 if job.lookahead else job.batch * c.row * stream(job) / max(1, tokens * c.hidden)
    return stream(job) + tokens * c.head * 4 + rows + job.live_activations


def samples(job: Job) -> float:
    """Latents, noise, target and text of the batch, in fp32 and in the base's type."""
    return job.batch * job.tokens * LATENTS * job.counts.channels * 4.0


def controls(job: Job) -> float:
    """What blocks of control models hold beside the transformer's."""
    mode = "keep" if job.kept == len(job.counts.blocks) else "boundary"
    blocks = sum(n * cost(job, kind, mode)[0] for kind, n in zip(("double", "single"), job.control_blocks, strict=True) if n)
    return blocks + job.control_held


def gradients(job: Job) -> list[float]:
    """Bytes that each block's backward pass leaves."""
    count = job.trained + (job.counts.total if job.is_full else 0)
    if job.is_fused or any(job.control_blocks):
        return [0.0 for _ in job.counts.blocks]
    total = sum(job.counts.blocks)
    return [count * job.trained_width * size / total for size in job.counts.blocks]


def saved(job: Job) -> int:
    """Bytes that wait on the device when the backward pass begins."""
    return int(sum(held for held, _, _ in block_costs(job)) + inputs(job) + controls(job))


def hardest(job: Job) -> Moment:
    """The moment of a step that needs most."""
    costs, grads, always = block_costs(job), gradients(job), inputs(job) + controls(job) + samples(job)
    held, left = [always], [0.0]
    for own, _, _ in costs:
        held.append(held[-1] + own)
    for own in reversed(grads):
        left.append(left[-1] + own)
    left.reverse()  # left[i]: gradients of blocks i and later
    moments = [Moment(held[i], forward, 0.0) for i, (_, forward, _) in enumerate(costs)]
    moments += [Moment(held[i + 1], backward + unpacked(job), left[i + 1]) for i, (_, _, backward) in enumerate(costs)]
    everything = float(job.trained * job.trained_width) if any(job.control_blocks) else left[0]  # a ControlNet's come last
    moments.append(Moment(job.control_held, job.update * everything, everything))
    if job.encodes_condition:
        moments.append(Moment(samples(job), PIXEL * job.ae_channels * job.batch * job.side**2, 0.0))
    return max(moments, key=lambda one: one.total)


def unpacked(job: Job) -> float:
    """A layer's weight in 16 bits while it is multiplied, on a card; on the CPU the rehearsal knows."""
    return 2.0 * job.counts.largest if job.quant and (job.on_card or job.costs is None) else 0.0
