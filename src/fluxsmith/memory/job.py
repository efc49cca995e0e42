"""A run in numbers: what `memory.plan` predicts from. Pure data; `train.planning` fills it in, and any change is tried by `replace`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fluxsmith.memory.sizes import AUTOENCODER, BYTES, CLIP_L, T5XXL, Counts, evenly_spaced

GIB = 2**30
DOUBLE_ROWS, SINGLE_ROWS = 12, 3  # shifts, scales and gates of a block
ROWS = 64  # samples that modulation look-ahead evaluates at once


class Cost(NamedTuple):
    """What one block costs, in bytes a token of the batch."""

    held: float
    """After its forward pass, with what it hands on."""
    forward: float
    """Peak while it runs, over what is there before."""
    backward: float
    """Peak while it is differentiated, over what is held."""


class Costs(NamedTuple):
    """Of a block by kind ("double", "single", "last") and mode, measured for a base whose values have so many bytes."""

    table: Mapping[tuple[str, str], Cost]
    width: int


class Stored(NamedTuple):
    """Bytes of the transformer as it will be stored, where that is known layer by layer."""

    blocks: tuple[int, ...]
    """Of each block, without its modulation."""
    modulation: int
    rest: int


STREAMS: Mapping[tuple[str, str], tuple[float, float, float]] = {
    ("double", "keep"): (14, 22, 18),
    ("double", "selective"): (11, 21, 21),
    ("double", "boundary"): (1, 20, 31),
    ("single", "keep"): (13, 19, 21),
    ("single", "selective"): (9, 18, 25),
    ("single", "boundary"): (1, 18, 33),
    ("last", "keep"): (12, 17, 19),
    ("last", "selective"): (8, 16, 23),
    ("last", "boundary"): (1, 16, 30),
}
"""What a LoRA run's blocks cost, in streams (tokens x hidden values), where nothing was rehearsed."""


@dataclass(frozen=True)
class Job:
    """A run in numbers."""

    counts: Counts
    base: str = "bf16"
    """Type of the frozen transformer."""
    quant: str = ""
    """Kind of its quantised layers; empty for none."""
    trained: int = 0
    """Trained parameters outside the base."""
    trained_width: int = 4
    """Bytes of one trained parameter; gradients have the same."""
    state_bytes: float = 8.0
    """Optimizer state for one trained parameter."""
    averages: int = 0
    """1 with a running average of the weights."""
    is_full: bool = False
    """The transformer itself is trained."""
    is_fused: bool = False
    """Gradients are freed block by block."""
    tokens: int = 4608
    """Text and image tokens of the largest sample."""
    batch: int = 1
    side: int = 1024
    """Pixels of the largest picture's side, as if it were a square."""
    kept: int = 57
    """Blocks that keep everything, then those that are selective and offloaded; the rest keeps its boundary."""
    selective: int = 0
    offloaded: int = 0
    streamed: int = 0
    """Blocks whose weights wait on the host."""
    slots: int = 2
    per_unit: int = 1
    lookahead: bool = True
    by_host: bool = False
    """The transformer is put together on the host, because parts of it stay there or the card cannot take all of it."""
    text: str = "bf16"
    """Type or kind of the text encoders."""
    text_weights: int = T5XXL + CLIP_L
    """Parameters of the text encoders and of the autoencoder."""
    ae_weights: int = AUTOENCODER
    ae_channels: int = 128
    """Of its finest maps."""
    live_text: bool = False
    """They stay in the loop."""
    caches: bool = True
    """Latents and text are encoded before training."""
    encode_batch: int = 8
    sample_side: int = 0
    """Largest side of sample pictures; 0 for none."""
    on_card: bool = True
    """False: there is no device memory apart from the host's."""
    costs: Costs | None = None
    """Of blocks, as they were rehearsed; the known ones of a LoRA without them."""
    stored: Stored | None = None
    """Bytes of layers as they will be stored; by type and count without them."""
    control_weights: int = 0
    """Bytes of control models beside the transformer."""
    control_blocks: tuple[int, int] = (0, 0)
    """Double and single blocks of control models that gradients go through."""
    control_held: int = 0
    """Bytes that they keep outside their blocks."""
    encodes_condition: bool = False
    """The autoencoder works in every step."""
    live_activations: int = 0
    """Bytes that trained text encoders keep for the backward pass."""
    update: float = 0.0
    """Bytes that the optimizer takes and gives back while it updates, for one trained byte."""
    states_on_host: bool = False


def cost(job: Job, kind: str, mode: str) -> tuple[float, float, float]:
    """Bytes that one block holds, and its forward and backward peaks."""
    if job.costs is None:
        unit, own = float(stream(job)), STREAMS[kind, mode]
    else:
        unit, own = job.batch * job.tokens * activation_width(job) / job.costs.width, job.costs.table[kind, mode]
    return own[0] * unit, own[1] * unit, own[2] * unit


def block_bytes(job: Job) -> tuple[float, ...]:
    """Bytes of each block's frozen weights."""
    return job.stored.blocks if job.stored is not None else tuple(count * width(job) for count in job.counts.blocks)


def width(job: Job) -> float:
    """Bytes of one weight in the blocks."""
    return BYTES[job.quant or job.base]


def activation_width(job: Job) -> float:
    """Bytes of one value between layers."""
    return BYTES[job.base]


def stream(job: Job) -> int:
    """Bytes of all tokens of the batch at the model's width."""
    return int(job.batch * job.tokens * job.counts.hidden * activation_width(job))


def weights(job: Job) -> dict[str, int]:
    """Device bytes of the transformer by part."""
    c, sizes = job.counts, block_bytes(job)
    gone = sum(sizes[i] for i in streamed_indices(job))
    parts = {"blocks": int(sum(sizes) - gone), "embedders and last layer": rest_bytes(job)}
    if job.streamed:
        parts["slots"] = int(max(sizes[i] for i in streamed_indices(job)) * min(job.slots, -(-job.streamed // job.per_unit)) * job.per_unit)
    if job.lookahead:
        parts["modulation rows"] = int(ROWS * c.row * activation_width(job))
    else:
        parts["modulation"] = int(modulation_bytes(job) * (1 - streamed_modulation(job)))
        if job.streamed:
            largest = (DOUBLE_ROWS if streamed_indices(job)[0] < job.counts.depth else SINGLE_ROWS) * job.per_unit
            parts["slots"] += int(modulation_bytes(job) * min(job.slots, job.streamed) * largest / modulation_rows(job))
    return parts


def modulation_rows(job: Job) -> int:
    """Rows of all blocks' modulations, in units of the width."""
    return DOUBLE_ROWS * job.counts.depth + SINGLE_ROWS * (len(job.counts.blocks) - job.counts.depth)


def streamed_modulation(job: Job) -> float:
    """Share of the modulation weights that is in streamed blocks."""
    rows = [DOUBLE_ROWS if index < job.counts.depth else SINGLE_ROWS for index in streamed_indices(job)]
    return sum(rows) / modulation_rows(job)


def streamed_indices(job: Job) -> list[int]:
    """Numbers of the blocks that wait on the host."""
    return evenly_spaced(job.streamed, len(job.counts.blocks))


def trained_parts(job: Job) -> dict[str, int]:
    """Device bytes of what is trained, with its averages and optimizer states."""
    count = job.trained + (job.counts.total if job.is_full else 0)
    own = 0 if job.is_full else job.trained * job.trained_width
    states = 0 if job.states_on_host else int(count * job.state_bytes)
    return {"trained weights": own + count * job.trained_width * job.averages, "optimizer": states}


def whole(job: Job) -> int:
    """Bytes of the transformer as it is stored, wherever it is."""
    return int(sum(block_bytes(job)) + modulation_bytes(job)) + rest_bytes(job)


def rest_bytes(job: Job) -> int:
    """Embedders and the last layer."""
    return job.stored.rest if job.stored is not None else int(job.counts.rest * BYTES[job.base])


def modulation_bytes(job: Job) -> float:
    """nf4 keeps these layers in 8 bits: their outputs scale every token."""
    return job.stored.modulation if job.stored is not None else job.counts.modulation * (1.0 if job.quant == "nf4" else width(job))


def host_weights(job: Job) -> int:
    """Bytes of what waits on the host while training."""
    sizes = block_bytes(job)
    waiting = sum(sizes[i] for i in streamed_indices(job))
    return int(waiting + modulation_bytes(job) * (1 if job.lookahead else streamed_modulation(job)) + stream(job) * job.offloaded)
