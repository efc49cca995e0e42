"""From a config to the numbers of `memory.plan`, before any weight is read, and from its choice back to the config.

Sizes come from the headers of the model's files; where a file is missing, from the family's known form, and that is said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fluxsmith.adapters.targets import Layer, Target, select
from fluxsmith.config.adapter import AdapterConfig
from fluxsmith.config.choice import realise
from fluxsmith.config.memory import CheckpointingPlan
from fluxsmith.config.schema import DatasetConfig, RunConfig
from fluxsmith.errors import FluxsmithError
from fluxsmith.events import Bus, Warned
from fluxsmith.io.header import read_header
from fluxsmith.io.shards import shard_paths
from fluxsmith.memory.block_swap import streaming
from fluxsmith.memory.checkpoint import modes_of
from fluxsmith.memory.plan import GIB, Choice, Job, choose, cures, peak, predict, traffic, whole
from fluxsmith.memory.rate import CARDS, Rate, moved_bytes, rate, step_work
from fluxsmith.memory.sizes import AUTOENCODER, BYTES, CLIP_L, FORMS, MODULATION, T5XXL, Shapes, count, shapes_of
from fluxsmith.models.files import locate
from fluxsmith.models.packing import token_count
from fluxsmith.train.lookahead import EMBEDDERS
from fluxsmith.train.plan_sizes import Sizes, control_sizes, stored, trained_sizes
from fluxsmith.train.rehearsal import Rehearsed, rehearse
from fluxsmith.train.trained import DTYPES

PREFIXES = ("", "model.diffusion_model.")
STATES: Mapping[str, float] = {"sgd": 0.0, "lion": 4.0, "adafactor": 0.1, "prodigy": 16.0, "muon": 4.0, "adamw_bf16": 4.0}
"""Bytes of optimizer state for one fp32 parameter; two moments (8) where a name is not here."""
ADDITIVE = ("lora", "lokr", "loha", "full")  # kinds that leave the base product alone


class Planned(NamedTuple):
    """A config in numbers."""

    job: Job
    notes: tuple[str, ...]
    """What had to be assumed."""


def model_shapes(config: RunConfig) -> tuple[Shapes, str]:
    """The transformer's tensors by their own names, and a note where they are those of a known form instead of the file's."""
    form = "schnell" if config.model.model_dump().get("preset") == "schnell" else "dev"
    try:
        path = locate(config.model).path("dit")
        shapes = {name: info.shape for shard in shard_paths(path) for name, info in read_header(shard).tensors.items()}
    except (FluxsmithError, OSError) as error:
        return shapes_of(FORMS[form]), f"sizes are those of FLUX.1-{form}: {str(error).splitlines()[0]}"
    for prefix in PREFIXES:
        if f"{prefix}img_in.weight" in shapes and shapes[f"{prefix}img_in.weight"][1:]:
            return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}, ""
    return shapes_of(FORMS[form]), f"sizes are those of FLUX.1-{form}: {path.name} has other key names"


def encoder_sizes(config: RunConfig) -> dict[str, int]:
    """Parameters of text encoders and autoencoder, of the files where they are there."""
    known = {"text": {"t5xxl": T5XXL, "clip_l": CLIP_L}, "ae": {"ae": AUTOENCODER}}
    roles = realise(config.model).facts().roles
    made = {}
    for name, sizes in known.items():
        made[name] = sum(_elements(config, role, size) for role, size in sizes.items() if role in roles)
    return made


def ae_channels(config: RunConfig) -> int:
    """Of the autoencoder's finest maps: 128 in FLUX.1's, fewer in a tiny one."""
    try:
        shapes = {
            name: info.shape for shard in shard_paths(locate(config.model).path("ae")) for name, info in read_header(shard).tensors.items()
        }
    except (FluxsmithError, OSError):
        return 128
    first = next((shape for name, shape in shapes.items() if name.endswith(("encoder.conv_in.weight", "encoder.layers.0.weight"))), (128,))
    return int(first[0])


def _elements(config: RunConfig, role: str, otherwise: int) -> int:
    try:
        shards = shard_paths(locate(config.model).path(role))
        return sum(info.elements for shard in shards for info in read_header(shard).tensors.values())
    except (FluxsmithError, OSError):  # the transformer's note says what is assumed
        return otherwise


def planned(
    config: RunConfig, *, on_card: bool | None = None, shapes: Shapes | None = None, rehearses: bool = False
) -> Planned:  # fmt: skip
    """The job of a config. `on_card`: a card is there, or planned for; by default where the run would go.

    `shapes` of the transformer, where they are known without its file. `rehearses`: blocks run once on tensors without memory, which takes
    a second or two and makes the prediction exact for any adapter; without it their costs are those of a LoRA.
    """
    card = on_card if on_card is not None else config.train.device != "cpu" and torch.cuda.is_available()
    shapes, note = model_shapes(config) if shapes is None else (shapes, "")
    memory, counts = config.memory, count(shapes)
    total = len(counts.blocks)
    modes = modes_of(memory, counts.depth, total - counts.depth)
    how = streaming(memory, counts.depth, total - counts.depth)
    is_full = config.adapter is None and not config.control and "dit" in config.train.components
    base = _base(config, on_card=card, is_full=is_full)
    encoders, side, batch, tokens = encoder_sizes(config), *_largest(config)
    targets = _targets(config, shapes)
    known = _factors(config, targets)
    is_quick = known is not None and not rehearses
    trained = Sizes(None, known or 0) if is_quick else trained_sizes(config, shapes, base=base, is_full=is_full, known=known)
    control = control_sizes(config, shapes, base)
    trained_width = 4 if config.train.weights_dtype == "fp32" else 2
    job = Job(
        counts, base, _kind(config), trained.adapters + control.trained,
        trained_width=trained_width, state_bytes=_states(config) * trained_width / 4, averages=int(config.train.ema is not None),
        is_full=is_full, is_fused=memory.fused_update != "off", tokens=tokens, batch=batch, side=side,
        kept=modes.count("keep"), selective=modes.count("selective"), offloaded=modes.count("offloaded"),
        streamed=len(how.indices), slots=how.slots, per_unit=how.per_unit,
        lookahead=counts.modulation > 0 and _is_ahead(config, targets, on_card=card), text=_text(config, on_card=card),
        live_text=config.cache.text == "off" or trained.has_text, caches="off" not in (config.cache.latents, config.cache.text),
        encode_batch=config.cache.batch_size, sample_side=max((max(s.width, s.height) for s in config.sample), default=0), on_card=card,
        text_weights=encoders["text"], ae_weights=encoders["ae"], ae_channels=ae_channels(config),
        stored=stored(config, shapes, base), control_weights=control.weights,
        control_blocks=control.blocks,
        control_held=control.held * batch * side**2, encodes_condition=control.encodes,
        live_activations=trained.text_activations(batch), update=_update(config, on_card=card),
        states_on_host=memory.optimizer_offload != "off",
    )  # fmt: skip
    if rehearses and trained.dit is not None:
        how_many = Rehearsed(DTYPES[base], card, tokens, batch)
        job = replace(job, costs=rehearse(config, trained.dit, how_many))
    return Planned(replace(job, by_host=by_host(config, job, _free(on_card=card))), (note,) if note else ())


def _factors(config: RunConfig, targets: Sequence[Target]) -> int | None:
    """Weights of a plain LoRA on the transformer, or of no adapter; None where shapes have to tell."""
    adapter = config.adapter
    if adapter is None:
        return 0
    if not isinstance(adapter, AdapterConfig) or adapter.text_encoders or adapter.model_dump()["type"] != "lora":
        return None
    return sum(target.rank * (target.layer.in_features + target.rows[1] - target.rows[0]) for target in targets)


def _kind(config: RunConfig) -> str:
    return "" if config.quant is None else str(config.quant.model_dump()["type"]).replace("none", "")


def _update(config: RunConfig, *, on_card: bool) -> float:
    """torch's optimizers work on all tensors at once on a card, with one temporary of their size."""
    return 1.0 if on_card and config.optim.model_dump()["type"] == "torch" and config.memory.fused_update == "off" else 0.0


def by_host(config: RunConfig, job: Job, free: int | None) -> bool:
    """Is the transformer put together on the host first? Where blocks stay there, or the device cannot take the whole of it."""
    if config.memory.streams:
        return True
    needed = whole(job) + (int(max(job.counts.blocks) * (BYTES[job.base] + 4)) if job.quant else 0)
    return job.lookahead and not config.control and free is not None and needed > free


def _free(*, on_card: bool) -> int | None:
    return torch.cuda.mem_get_info()[0] if on_card and torch.cuda.is_available() else None


def apply(config: RunConfig, bus: Bus) -> RunConfig:
    """The config with what `memory.plan = "auto"` chooses, said aloud; the same config with "off"."""
    if config.memory.plan == "off":
        return config
    card = config.memory.card
    if card is None and config.train.device != "cpu" and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0).total_memory / GIB
    if card is None:
        bus.send(Warned('memory.plan = "auto" has nothing to do: there is no card, and memory.card names none'))
        return config
    job = planned(config, on_card=True, rehearses=True).job
    choice = choose(job, card)
    for line in told(choice, card):
        bus.send(Warned(line))
    return with_choice(config, choice)


def rates(job: Job) -> dict[str, Rate]:
    """Predicted seconds a step on cards that are known, from FLOPs and bytes over the bus."""
    again = 1 - (job.kept + job.selective) / len(job.counts.blocks)
    work = step_work(job.counts, job.tokens, job.batch, trains_base=job.is_full, recomputed=again)
    return {name: rate(work, card, job.quant, moved_bytes(*traffic(job))) for name, card in CARDS.items()}


def told(choice: Choice, card: float) -> list[str]:
    """What was chosen and why, and what would help where it is not enough."""
    lines = [f"memory plan for {card:g} GiB: {'; '.join(choice.why)} (peak {peak(choice.job, 'train') / GIB:.1f} GiB)"]
    for phase in predict(choice.job):
        if phase.device > card * GIB:
            helps = [f"{c.text} (-{c.saves / GIB:.1f} GiB)" for c in cures(choice.job, phase.name)[:3]]
            lines.append(f"phase {phase.name!r} needs {phase.device / GIB:.1f} of {card:g} GiB: {', or '.join(helps) or 'a larger card'}")
    return lines


def with_choice(config: RunConfig, choice: Choice) -> RunConfig:
    """The config with a choice's settings; the plan is done then."""
    job, total = choice.job, len(choice.job.counts.blocks)
    recomputes = job.kept < total
    plan = CheckpointingPlan(keep=job.kept, selective=job.selective, offloaded=job.offloaded) if recomputes else None
    changes: dict[str, Any] = {
        "plan": "off", "card": None, "checkpointing": recomputes, "checkpointing_plan": plan, "checkpointing_offload": False,
        "checkpointing_interval": 1, "stream_blocks": job.streamed,
    }  # fmt: skip
    return config.model_copy(update={"memory": config.memory.model_copy(update=changes)})


def out_of_memory_cures(config: RunConfig, phase: str) -> list[str]:
    """The three cheapest changes that save something in a phase, with what they save."""
    job = planned(config).job
    return [f"{change.text} (saves about {change.saves / GIB:.2g} GiB)" for change in cures(job, phase)[:3]]


def _base(config: RunConfig, *, on_card: bool, is_full: bool) -> str:
    if is_full:
        return config.train.weights_dtype
    if config.train.base_dtype != "auto":
        return config.train.base_dtype
    return "bf16" if on_card else "fp32"


def _text(config: RunConfig, *, on_card: bool) -> str:
    kind = config.quant.model_dump().get("text_encoders") if config.quant is not None else None
    if kind:
        found = kind.get("t5xxl", "bf16") if isinstance(kind, dict) else str(config.quant.model_dump()["type"]) if kind is True else kind  # type: ignore[union-attr]  # tested above
        return str(found)
    given = config.model.model_dump().get("text_dtype", "auto")
    asked = str(given.get("t5xxl", "auto") if isinstance(given, dict) else given)
    return asked if asked != "auto" else "bf16" if on_card else "fp32"


def _states(config: RunConfig) -> float:
    values = config.optim.model_dump()
    name = str(values.get("name") or values["type"]).lower().replace("_", "")
    full = next((size for key, size in STATES.items() if key.replace("_", "") in name), 8.0)
    return full / 4 if "8bit" in name else full


def _targets(config: RunConfig, shapes: Shapes) -> list[Target]:
    adapter = config.adapter
    if not isinstance(adapter, AdapterConfig):
        return []
    matrices = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2}
    layers = [Layer(f"dit.{name}", shape[1], shape[0]) for name, shape in matrices.items()]
    return select(adapter, layers, split=bool(adapter.model_dump().get("split_qkv")))


def _is_ahead(config: RunConfig, targets: Sequence[Target], *, on_card: bool) -> bool:
    """Will modulation weights leave the device? As `lookahead.obstacle` decides it on the loaded model."""
    wish = config.memory.modulation
    if wish == "resident" or (wish == "auto" and not on_card) or config.cache.text == "off":
        return False
    if config.adapter is None:
        return bool(config.control) or "dit" not in config.train.components
    needs_weights = str(config.adapter.model_dump()["type"]) not in ADDITIVE
    return not any(t.layer.path.startswith(EMBEDDERS) or (needs_weights and MODULATION.search(f"{t.layer.path}.")) for t in targets)


def _largest(config: RunConfig) -> tuple[int, int, int]:
    """Side, batch size and tokens of the batch that needs most."""
    length, found = realise(config.model).facts().t5_length, (16, 1, 1)
    for data in config.data:
        if isinstance(data, DatasetConfig):
            sides = data.resolution if isinstance(data.resolution, tuple) else (data.resolution, data.resolution)
            side = round((sides[0] * sides[1]) ** 0.5)
            tokens = length + token_count(sides[1] // 8, sides[0] // 8)
            found = max(found, (side, data.batch_size, tokens), key=lambda one: one[1] * one[2])
    return found
