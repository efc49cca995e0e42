"""What a run needs before it starts: device and host bytes of each phase, from sizes alone. Formulas: docs/explanation/memory.md.

`predict(job)` gives the phases, `choose(job, card)` the settings that fit a card, `cures(job)` what would save how much. Pure: a `Job`
is numbers, so any change is tried by `replace`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fluxsmith.memory.job import (
    GIB,
    Job,
    block_bytes,
    host_weights,
    stream,
    streamed_indices,
    trained_parts,
    weights,
    whole,
    width,
)
from fluxsmith.memory.sizes import BYTES
from fluxsmith.memory.timeline import PIXEL, cost, hardest, kinds, saved

__all__ = ["CONTEXT", "GIB", "Change", "Choice", "Job", "Phase", "choose", "cures", "peak", "predict", "saved", "traffic", "whole"]

CONTEXT = GIB // 2  # what a card holds before the first tensor
PROCESS = 2 * GIB  # Python, torch and its libraries on the host
RESERVE = int(0.05 * GIB)  # of a card: what the desktop and the allocator's rounding take beside the context


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


def traffic(job: Job) -> tuple[int, float, float]:
    """Streamed blocks, their bytes, and bytes of boundaries that wait on the host: what `rate.moved_bytes` takes."""
    sizes = block_bytes(job)
    gone = float(sum(sizes[i] for i in streamed_indices(job)))
    return job.streamed, gone, float(stream(job) * job.offloaded)


def predict(job: Job) -> list[Phase]:
    """All phases in order. On a CPU device memory is host memory."""
    text_bytes = int(job.text_weights * BYTES[job.text])
    ae_bytes = job.ae_weights * 4
    model, training = weights(job), trained_parts(job)
    resting = PROCESS + host_weights(job)
    states = int((job.trained or job.counts.total) * job.state_bytes) if job.states_on_host else 0
    encoders = {"text encoders": text_bytes} if job.live_text else {}
    drawing = {"autoencoder": ae_bytes} if job.sample_side or job.encodes_condition else {}
    loop = {**model, **training, **encoders, **drawing}
    if job.control_weights:
        loop["control models"] = job.control_weights
    drawn = replace(job, batch=1, tokens=max(1, job.tokens + (job.sample_side**2 - job.side**2) // 256))
    sample = int(max(cost(drawn, kind, "boundary")[1] for kind in kinds(job.counts)) + 2 * stream(drawn))
    decode = PIXEL * job.ae_channels * min(job.sample_side, 1536) ** 2  # larger pictures are decoded in tiles
    phases: list[tuple[str, dict[str, int], int]] = []
    if job.caches:
        pictures = PIXEL * job.ae_channels * job.side**2 * job.encode_batch
        phases.append(("encode pictures", {"autoencoder": ae_bytes, "pictures": pictures}, PROCESS))
        captions = {"autoencoder": ae_bytes, "text encoders": text_bytes, "captions": job.encode_batch * 512 * 10_240 * 2 * 3}
        phases.append(("encode captions", captions, PROCESS))
    phases += _loading(job, model, encoders)
    moment = hardest(job)
    step = {"activations": int(moment.held), "one block": int(moment.working), "gradients": int(moment.gradients)}
    phases.append(("train", {**loop, **step}, resting + states))
    if job.sample_side:
        phases.append(("sample", {**loop, "picture": max(sample, decode)}, resting + states))
    saving = (job.trained or job.counts.total) * (4 + int(job.state_bytes))
    phases.append(("save", loop, resting + saving + states))
    return [_phase(job, *phase) for phase in phases]


def _loading(job: Job, model: dict[str, int], encoders: dict[str, int]) -> list[tuple[str, dict[str, int], int]]:
    """Reading is tensor by tensor; quantising happens on the way, block by block."""
    tensor = int(job.counts.largest * BYTES[job.base])
    taken = max((int(job.counts.blocks[i] * width(job)) for i in streamed_indices(job)), default=0) * job.per_unit
    once = max(tensor, taken)  # a tensor that is read, then a block that is copied to where it waits
    done, full = quantising(job)
    all_of_it = {"transformer": whole(job)}
    if job.by_host and job.on_card:
        block = max(full_blocks(job))
        quantise = ("quantise", {**encoders, "block in full": block + temporaries(job)}, PROCESS + whole(job) + block)
        load = ("load", {**model, **encoders}, PROCESS + whole(job) + once)
    else:
        waiting = host_weights(job) if job.on_card else 0
        quantise = ("quantise", {"finished blocks": done, **encoders, "block in full": full}, PROCESS + tensor * job.on_card)
        load = ("load", {**all_of_it, **encoders}, PROCESS + once + waiting)
    return [quantise, load] if job.quant else [load]


def full_blocks(job: Job) -> list[int]:
    """Bytes of each block with its modulation, before it is quantised."""
    c = job.counts
    share = c.modulation / max(1, 4 * c.depth + len(c.blocks) - c.depth)  # a double block has four times a single one's
    return [int((block + share * (4 if index < c.depth else 1)) * BYTES[job.base]) for index, block in enumerate(c.blocks)]


def temporaries(job: Job) -> int:
    """Bytes while one layer is quantised: its fp32 copy, the quotient, and the result."""
    return int(job.counts.largest * (9 if job.base != "fp32" else 5))


def quantising(job: Job) -> tuple[int, int]:
    """The fullest moment: bytes of the blocks that are finished, and of the one that is not with its temporaries."""
    done, moments = job.counts.rest * BYTES[job.base], []
    for full in full_blocks(job):
        moments.append((int(done), full + temporaries(job)))
        done += full / BYTES[job.base] * width(job)
    return max(moments, key=sum, default=(0, 0))


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
    loading = max(whole(job), sum(quantising(job)) if job.quant else 0) + CONTEXT
    plain = replace(job, kept=total, selective=0, offloaded=0, streamed=0, by_host=loading > budget)

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
    total = len(job.counts.blocks)
    selective = _most(total, lambda n: peak(replace(job, selective=n), "train") <= budget)
    kept = 0
    if selective == total:
        kept = _most(total - 1, lambda n: peak(replace(job, kept=n, selective=total - n), "train") <= budget)
        selective = total - kept
    why = f"{total - kept - selective} blocks are recomputed from their inputs, {selective} keep their products, {kept} keep everything"
    return Choice(replace(job, kept=kept, selective=selective), True, (why,))


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits; 0 fits."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


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
        (is_frozen and not job.quant, 'quant = { type = "int8" }', {"quant": "int8", "stored": None}),
        (is_frozen and not job.quant, 'quant = { type = "nf4" }', {"quant": "nf4", "stored": None}),
        (BYTES[job.text] > 1, "quant.text_encoders = true", {"text": "int8"}),
        (job.side > 512, "a smaller data.resolution (512)", {"side": 512, "tokens": smaller}),
        (job.base == "fp32", "train.base_dtype = bf16", {"base": "bf16"}),
    ]
