"""What a run needs before it starts: device and host bytes of each phase, from sizes alone. Formulas: docs/explanation/memory.md.

`predict(job)` gives the phases, `choose(job, card)` the settings that fit a card, `cures(job)` what would save how much. Pure: a `Job`
is numbers, so any change is tried by `replace`.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fluxsmith.memory.sizes import AUTOENCODER, BYTES, CLIP_L, T5XXL, Counts

GIB = 2**30
CONTEXT = GIB // 2  # what a card holds before the first tensor
PROCESS = 2 * GIB  # Python, torch and its libraries on the host
RESERVE = int(0.05 * GIB)  # of a card: what the desktop and the allocator's rounding take beside the context
ROWS = 64  # samples that modulation look-ahead evaluates at once
KEPT_DOUBLE, KEPT_SINGLE = 14, 12  # streams (tokens x hidden) that a block keeps when nothing is computed again; MLP of 4 x hidden
SELECTIVE = 9
WORKING = 10  # streams of gradients and temporaries while one block is differentiated
SAMPLING = 12  # the same without gradients
PIXEL = 128 * 4 * 3  # bytes a pixel while the autoencoder works: three maps of 128 channels in fp32
WEIGHT_ONLY = ("int4", "int2", "nf4")  # their largest layer is unpacked for each product


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
    live_text: bool = False
    """They stay in the loop."""
    caches: bool = True
    """Latents and text are encoded before training."""
    encode_batch: int = 8
    sample_side: int = 0
    """Largest side of sample pictures; 0 for none."""
    on_card: bool = True
    """False: there is no device memory apart from the host's."""


class Phase(NamedTuple):
    """Peaks of one phase, bytes."""

    name: str
    device: int
    host: int
    parts: dict[str, int]
    """What the device peak is made of."""


@dataclass(frozen=True)
class Change:
    """Something that would need less."""

    text: str
    job: Job
    saves: int
    """Bytes of the highest device peak, or of the named phase."""


def width(job: Job) -> float:
    """Bytes of one weight in the blocks."""
    return BYTES[job.quant or job.base]


def activation_width(job: Job) -> float:
    """Bytes of one value between layers."""
    return BYTES[job.base]


def stream(job: Job) -> int:
    """Bytes of all tokens of the batch at the model's width."""
    return int(job.batch * job.tokens * job.counts.hidden * activation_width(job))


def saved(job: Job) -> int:
    """Bytes that wait on the device for the backward pass."""
    c, u = job.counts, stream(job)
    total, extra = len(c.blocks), c.mlp / c.hidden - 4
    per_block = [KEPT_DOUBLE + extra if i < c.depth else KEPT_SINGLE + extra for i in range(total)]
    keep = per_block[total - job.kept :] if job.kept else []
    boundaries = total - job.kept - job.selective - job.offloaded
    return int(u * (sum(keep) + SELECTIVE * job.selective + boundaries + 1))  # one more: rotary table, rows, the last layer's input


def working(job: Job) -> int:
    """Bytes on top while one block is differentiated: what its recomputation keeps, and gradients."""
    recomputed = KEPT_DOUBLE if job.kept < len(job.counts.blocks) else 0
    unpacked = int(2 * job.counts.largest) if job.quant in WEIGHT_ONLY else 0
    return stream(job) * (recomputed + WORKING) + unpacked


def weights(job: Job) -> dict[str, int]:
    """Device bytes of the transformer by part."""
    c, w = job.counts, width(job)
    gone = sum(c.blocks[i] for i in streamed_indices(job))
    parts = {"blocks": int((sum(c.blocks) - gone) * w), "embedders and last layer": int(c.rest * BYTES[job.base])}
    if job.streamed:
        parts["slots"] = int(max(c.blocks) * w * min(job.slots, -(-job.streamed // job.per_unit)) * job.per_unit)
    if job.lookahead:
        parts["modulation rows"] = int(ROWS * c.row * activation_width(job))
    else:
        parts["modulation"] = int(modulation_bytes(job))
    return parts


def streamed_indices(job: Job) -> list[int]:
    """Evenly spaced, as `block_swap.evenly`."""
    total = len(job.counts.blocks)
    return [(2 * i + 1) * total // (2 * job.streamed) for i in range(job.streamed)]


def trained_parts(job: Job) -> dict[str, int]:
    """Device bytes of what is trained, with gradients and states."""
    count = job.trained + (job.counts.total if job.is_full else 0)
    largest = max(job.counts.blocks) + job.counts.modulation // len(job.counts.blocks)
    grads = min(count, largest) if job.is_fused else count
    own = 0 if job.is_full else job.trained * job.trained_width
    return {
        "trained weights": own + count * job.trained_width * job.averages,
        "gradients": grads * job.trained_width,
        "optimizer": int(count * job.state_bytes),
    }


def whole(job: Job) -> int:
    """Bytes of the transformer as it is stored, wherever it is."""
    c = job.counts
    return int(sum(c.blocks) * width(job) + modulation_bytes(job) + c.rest * BYTES[job.base])


def modulation_bytes(job: Job) -> float:
    """nf4 keeps these layers in 8 bits: their outputs scale every token."""
    return job.counts.modulation * (1.0 if job.quant == "nf4" else width(job))


def host_weights(job: Job) -> int:
    """Bytes of what waits on the host while training."""
    c = job.counts
    waiting = sum(c.blocks[i] for i in streamed_indices(job)) * width(job)
    return int(waiting + (modulation_bytes(job) if job.lookahead else 0) + stream(job) * job.offloaded)


def traffic(job: Job) -> tuple[int, float, float]:
    """Streamed blocks, their bytes, and bytes of boundaries that wait on the host: what `rate.moved_bytes` takes."""
    gone = sum(job.counts.blocks[i] for i in streamed_indices(job)) * width(job)
    return job.streamed, gone, float(stream(job) * job.offloaded)


def predict(job: Job) -> list[Phase]:
    """All phases in order. On a CPU device memory is host memory."""
    text_bytes = int(job.text_weights * BYTES[job.text])
    ae_bytes = job.ae_weights * 4
    model, training = weights(job), trained_parts(job)
    resting = PROCESS + host_weights(job)
    encoders = {"text encoders": text_bytes} if job.live_text else {}
    drawing = {"autoencoder": ae_bytes} if job.sample_side else {}
    loop = {**model, **training, **encoders, **drawing}
    one = stream(replace(job, batch=1))
    sample = one * (job.sample_side or 1) ** 2 // max(1, job.side**2) * SAMPLING
    decode = PIXEL * min(job.sample_side, 1536) ** 2  # larger pictures are decoded in tiles
    phases: list[tuple[str, dict[str, int], int]] = []
    if job.caches:
        pictures = PIXEL * job.side**2 * job.encode_batch
        phases.append(("encode pictures", {"autoencoder": ae_bytes, "pictures": pictures}, PROCESS))
        captions = {"autoencoder": ae_bytes, "text encoders": text_bytes, "captions": job.encode_batch * 512 * 10_240 * 2 * 3}
        phases.append(("encode captions", captions, PROCESS))
    phases += _loading(job, model, encoders)
    phases.append(("train", {**loop, "activations": saved(job), "one block": working(job)}, resting))
    if job.sample_side:
        phases.append(("sample", {**loop, "picture": max(sample, decode)}, resting))
    saving = (job.trained or job.counts.total) * (4 + int(job.state_bytes))
    phases.append(("save", loop, resting + saving))
    return [_phase(job, *phase) for phase in phases]


def _loading(job: Job, model: dict[str, int], encoders: dict[str, int]) -> list[tuple[str, dict[str, int], int]]:
    """Reading is block by block, and quantising happens on the way."""
    one = int(max(job.counts.blocks) * BYTES[job.base])
    block = {"block in full": one + int(max(job.counts.blocks) * 4)}
    all_of_it = {"transformer": whole(job)}
    if job.by_host:
        quantise = ("quantise", {**encoders, **block}, PROCESS + whole(job) + one)
        load = ("load", {**model, **encoders}, PROCESS + whole(job) + one)
    else:
        quantise = ("quantise", {**all_of_it, **encoders, **block}, PROCESS + one)
        load = ("load", {**all_of_it, **encoders}, PROCESS + one + host_weights(job))
    return [quantise, load] if job.quant else [load]


def _phase(job: Job, name: str, parts: dict[str, int], host: int) -> Phase:
    own = {**parts, "context": CONTEXT} if job.on_card else parts
    total = sum(own.values())
    return Phase(name, total if job.on_card else 0, host if job.on_card else host + total, own)


def peak(job: Job, phase: str = "") -> int:
    """Highest device bytes (host bytes on the CPU) of a phase, or of all."""
    return max(p.device if job.on_card else p.host for p in predict(job) if phase in ("", p.name))


class Choice(NamedTuple):
    """Settings for a card."""

    job: Job
    fits: bool
    why: tuple[str, ...]


def choose(job: Job, card: float) -> Choice:
    """The fastest settings whose training fits a card of so many GiB: first what costs nothing, then time. It never quantises.

    Phases before training are the card's affair too, but no setting of this plan changes them.
    """
    budget, total = int(card * GIB) - RESERVE, len(job.counts.blocks)
    block = int(max(job.counts.blocks) * (BYTES[job.base] + 4)) if job.quant else 0
    plain = replace(job, kept=total, selective=0, offloaded=0, streamed=0, by_host=whole(job) + block + CONTEXT > budget)

    def fits(candidate: Job) -> bool:
        return max(peak(candidate, "train"), peak(candidate, "sample") if candidate.sample_side else 0) <= budget

    if fits(plain):
        return Choice(plain, True, ("nothing is computed again: activations fit",))
    recomputed = replace(plain, kept=0)
    if fits(recomputed):
        return _filled(recomputed, budget)
    why = ["every block is recomputed in the backward pass"]
    if job.is_full:
        return Choice(recomputed, False, tuple(why))
    now = replace(recomputed, offloaded=total)
    why.append("inputs of recomputed blocks wait in host memory")
    if not fits(now):
        streamed = next((n for n in range(1, total + 1) if fits(replace(now, streamed=n))), total)
        now = replace(now, streamed=streamed, by_host=True)
        why.append(f"{streamed} of {total} blocks are streamed from host memory")
    return Choice(now, fits(now), tuple(why))


def _filled(job: Job, budget: int) -> Choice:
    """Every block recomputed fits: what is left is filled with blocks that keep more, selective ones first."""
    total, left, u = len(job.counts.blocks), budget - peak(job, "train"), stream(job)
    selective = min(total, left // (u * (SELECTIVE - 1)))
    kept = 0
    if selective == total:
        left -= total * u * (SELECTIVE - 1)
        kept = min(total - 1, int(left // (u * (KEPT_DOUBLE - SELECTIVE))))
        selective = total - kept
    why = f"{total - kept - selective} blocks are recomputed from their inputs, {selective} keep their products, {kept} keep everything"
    return Choice(replace(job, kept=kept, selective=selective), True, (why,))


def cures(job: Job, phase: str = "train") -> list[Change]:
    """What would save device memory in a phase, cheapest first: exact and free, exact and slower, then what changes the run."""
    now = peak(job, phase)
    made = [Change(text, changed := replace(job, **how), now - peak(changed, phase)) for can, text, how in _ideas(job) if can]
    return [change for change in made if change.saves > now // 100]


def _ideas(job: Job) -> list[tuple[bool, str, dict[str, Any]]]:
    """(would it be something else than now, what to write, what changes), cheapest first."""
    total, is_frozen = len(job.counts.blocks), not job.is_full
    recomputed: dict[str, Any] = {"kept": 0, "selective": 0}
    streamed: dict[str, Any] = {**recomputed, "by_host": True}
    half = max(job.streamed, total // 2)
    smaller = max(1, job.tokens - (job.side**2 - 512**2) // 256)
    return [
        (job.kept + job.selective > 0, "memory.checkpointing = true (without checkpointing_plan)", recomputed),
        (is_frozen and not job.lookahead, 'memory.modulation = "lookahead"', {"lookahead": True}),
        (job.is_full and not job.is_fused, 'memory.fused_update = "block"', {"is_fused": True}),
        (job.encode_batch > 1, "cache.batch_size = 1", {"encode_batch": 1}),
        (job.batch > 1, "batch_size = 1 with train.accumulation raised", {"batch": 1}),
        (job.state_bytes > 2, "an optimizer with 8-bit states", {"state_bytes": 2.0}),
        (is_frozen and job.offloaded < total, "memory.checkpointing_offload = true", {**recomputed, "offloaded": total}),
        (is_frozen and job.streamed < half, f"memory.stream_blocks = {half}", {**streamed, "streamed": half}),
        (is_frozen and job.streamed < total, 'memory.stream_blocks = "all"', {**streamed, "streamed": total}),
        (is_frozen and not job.quant, 'quant = { type = "int8" }', {"quant": "int8"}),
        (is_frozen and not job.quant, 'quant = { type = "nf4" }', {"quant": "nf4"}),
        (BYTES[job.text] > 1, "quant.text_encoders = true", {"text": "int8"}),
        (job.side > 512, "a smaller data.resolution (512)", {"side": 512, "tokens": smaller}),
        (job.base == "fp32", "train.base_dtype = bf16", {"base": "bf16"}),
    ]
