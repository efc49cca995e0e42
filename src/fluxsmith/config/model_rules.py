"""Rules of what is trained beside what, and of memory: adapters, control models, quantised bases, fused updates, swapped blocks."""

from collections.abc import Iterator

from fluxsmith.config.dataset import DatasetConfig
from fluxsmith.config.finding import Finding
from fluxsmith.config.schema import RunConfig
from fluxsmith.config.section import PluginConfig
from fluxsmith.config.sections import KeyPath

TRAINABLE = ("controlnet",)  # controls that make conditioners of a batch
DRAWN = ("step1x", "nexus_gen")  # families whose text comes from a control


def kind(section: PluginConfig | None) -> str:
    """The `type` of a pluggable section; empty for none."""
    return "" if section is None else str(section.model_dump().get("type", ""))


def trains_control(config: RunConfig) -> bool:
    """True when a control model is what is trained."""
    return any(entry.model_dump().get("train") for entry in config.control)


def control(config: RunConfig) -> Iterator[Finding]:
    """Control models need condition pictures, and a transformer they were made for."""
    if not config.control:
        return
    trained = [index for index, entry in enumerate(config.control) if entry.model_dump().get("train")]
    if len(trained) > 1:
        yield Finding(("control", trained[1], "train"), "two control models are to be trained", "train one at a time")
    if trained and config.adapter is not None:
        yield Finding(
            ("adapter",), "an adapter and a control model are both to be trained", "remove [adapter], or write control.train = false"
        )
    if kind(config.model) == "chroma":
        yield Finding(("control",), "control models are for FLUX.1; Chroma has none", "remove [[control]], or use a FLUX.1 model")
    for index, data in enumerate(config.data):
        if isinstance(data, DatasetConfig) and data.condition_dir is None:
            fix = "write data.condition_dir, a folder of pictures with the same names"
            yield Finding(("data", index), "a control model is used, but this dataset has no condition pictures", fix)
    for index, sample in enumerate(config.sample):
        if sample.control_image is None:
            yield Finding(("sample", index), "a control model is used, but this sample has no condition", "write sample.control_image")


def for_drawing(config: RunConfig) -> Iterator[Finding]:
    """Controls that know no training batch."""
    for index, entry in enumerate(config.control):
        if entry.type and entry.type not in TRAINABLE and "." not in entry.type:
            fix = f"remove this [[control]]; types that can be trained: {', '.join(TRAINABLE)}"
            yield Finding(("control", index, "type"), f"{entry.type} is for drawing; it cannot be used in training yet", fix)


def family_for_drawing(config: RunConfig) -> Iterator[Finding]:
    """Families whose text is made by a control that knows no training batch."""
    if kind(config.model) in DRAWN:
        yield Finding(("model", "type"), f"{kind(config.model)} is for drawing; it cannot be trained yet", "use a FLUX.1 model")


def nothing_reads_conditions(config: RunConfig) -> Iterator[Finding]:
    """Condition pictures without a control model would be a wish that is not granted."""
    if config.control:
        return
    for index, data in enumerate(config.data):
        if isinstance(data, DatasetConfig) and data.condition_dir is not None:
            yield Finding(
                ("data", index, "condition_dir"), "no control model reads these pictures", "add [[control]], or remove condition_dir"
            )
    for index, sample in enumerate(config.sample):
        if sample.control_image is not None:
            yield Finding(("sample", index, "control_image"), "no control model reads this picture", "add [[control]], or remove it")


def base_is_frozen(config: RunConfig) -> Iterator[Finding]:
    """What needs a frozen transformer, in a run that trains it."""
    if config.adapter is not None or trains_control(config):
        if config.adapter is None:
            yield from _preserve(config)
        return
    if "dit" not in config.train.components:
        return
    if config.quant is not None and kind(config.quant) != "none":
        yield Finding(("quant",), "a quantised transformer cannot be trained itself", "add [adapter], or remove [quant]")
    memory = config.memory
    if memory.streams and memory.fused_update == "off" and memory.optimizer_offload == "off":
        fix = 'write memory.fused_update = "block", or memory.optimizer_offload = "states"'
        why = "their update has to come while they are on the card, or on the host"
        yield Finding(("memory", memory.streams), "blocks that are trained and swapped need one more choice", fix, why)
    if memory.streams and memory.fused_update != "off" and kind(config.optim) == "schedulefree":
        fix = 'write memory.optimizer_offload = "states" instead of memory.fused_update'
        yield Finding(("memory", "fused_update"), "schedule-free weights of swapped blocks are changed on the host", fix)
    yield from _preserve(config)


def _preserve(config: RunConfig) -> Iterator[Finding]:
    for index, data in enumerate(config.data):
        if isinstance(data, DatasetConfig) and data.preserve:
            fix = "add [adapter], or remove data.preserve"
            yield Finding(("data", index, "preserve"), "the base's own prediction is known only while it is frozen", fix)


def fused_update(config: RunConfig) -> Iterator[Finding]:
    """Gradients that are freed at once cannot be collected."""
    if config.memory.fused_update == "off":
        return
    if config.train.accumulation > 1:
        fix = "write train.accumulation = 1 (and a larger batch_size)"
        yield Finding(("train", "accumulation"), "a fused update cannot collect gradients over micro-batches", fix)
    if config.train.precision == "fp16":
        fix = 'write train.precision = "bf16"'
        yield Finding(("train", "precision"), "a fused update does not work with the gradient scaler of fp16", fix)


def optimizer_offload(config: RunConfig) -> Iterator[Finding]:
    """Updates on the host are for whole models, and one of the ways to save memory."""
    if config.memory.optimizer_offload == "off":
        return
    key: KeyPath = ("memory", "optimizer_offload")
    if config.adapter is not None:
        yield Finding(key, "an adapter is updated on the device: its states are small", 'write memory.optimizer_offload = "off"')
    if config.memory.fused_update != "off":
        fix = 'keep one: fused_update = "block" for small optimizer states, optimizer_offload for large ones'
        yield Finding(key, "memory.optimizer_offload and memory.fused_update exclude each other", fix)
    if config.train.precision == "fp16":
        fix = 'write train.precision = "bf16"'
        yield Finding(("train", "precision"), "updates on the host do not work with the gradient scaler of fp16", fix)
    if kind(config.optim) == "bnb":
        yield Finding(("optim", "type"), "the optimizers of bitsandbytes work on cards", "use adamw_bf16, or torch's adamw")


def memory(config: RunConfig) -> Iterator[Finding]:
    """Streaming and offloading lean on recomputation, and exclude each other."""
    part, plan = config.memory, config.memory.checkpointing_plan
    streams, key = part.streams, part.streams or "swap_blocks"
    asked = [name for name in ("swap_blocks", "stream_blocks", "offload") if name in part.model_dump(exclude_defaults=True)]
    offloads = part.checkpointing_offload or (plan is not None and plan.offloaded > 0)
    needs = {
        "checkpointing_offload": part.checkpointing_offload,
        "checkpointing_interval": part.checkpointing_interval > 1,
        "checkpointing_plan": plan is not None,
        key: bool(streams),
    }
    for name in [name for name, is_on in needs.items() if is_on and not part.checkpointing]:
        fix = f"write memory.checkpointing = true, or remove {name}"
        yield Finding(("memory", name), f"memory.{name} needs memory.checkpointing", fix)
    if len(asked) > 1:
        yield Finding(("memory", asked[1]), f"memory.{' and memory.'.join(asked)} exclude each other", "keep one of them")
    if offloads and part.swap_blocks:
        fix = "drop one: swap_blocks for few activations, checkpointing_offload for few weights; stream_blocks goes with both"
        yield Finding(("memory", "swap_blocks"), "memory.swap_blocks and memory.checkpointing_offload exclude each other", fix)
    if part.compile and streams:
        yield Finding(("memory", "compile"), "compiled blocks cannot be swapped", "drop one")
    if part.compile_lengths != "auto" and not part.compile:
        yield Finding(("memory", "compile_lengths"), "memory.compile_lengths has no effect", "write memory.compile = true, or remove it")
    if part.reference_rounding and part.kernels == "triton":
        yield Finding(("memory", "kernels"), "memory.reference_rounding and fused kernels exclude each other", "drop one")
    yield from _kept_blocks(config)


def _kept_blocks(config: RunConfig) -> Iterator[Finding]:
    part, plan = config.memory, config.memory.checkpointing_plan
    if plan is not None and part.checkpointing_interval > 1:
        fix = "keep one: the plan counts blocks, the interval spreads them"
        yield Finding(("memory", "checkpointing_plan"), "checkpointing_plan and checkpointing_interval exclude each other", fix)
    if part.plan == "auto" and part.model_dump(exclude_defaults=True).keys() & {"checkpointing_plan", "swap_blocks", "offload"}:
        fix = 'write memory.plan = "off", or remove what it chooses: checkpointing_plan, swap_blocks, offload'
        yield Finding(("memory", "plan"), 'memory.plan = "auto" chooses blocks by itself', fix)
    if part.card is not None and part.plan == "off":
        yield Finding(("memory", "card"), "memory.card has no effect", 'write memory.plan = "auto" (fluxsmith plan takes --card)')
    kind_of_control = config.control and any(entry.model_dump().get("train") for entry in config.control)
    if part.modulation == "lookahead" and config.adapter is None and not kind_of_control and "dit" in config.train.components:
        fix = 'write memory.modulation = "auto"'
        yield Finding(("memory", "modulation"), "modulation layers that are trained cannot be evaluated ahead", fix)


def objective(config: RunConfig) -> Iterator[Finding]:
    """The validation loss is that of the flow objective."""
    if kind(config.objective) != "flow" and (config.validation.every or config.validation.every_epochs):
        fix = "write validation.every = 0, and hold nothing out"
        yield Finding(("validation", "every"), f"objective {kind(config.objective)} has no validation loss", fix)


ELEMENTWISE = ("adamw", "adam", "sgd", "radam", "nadam", "rmsprop", "adagrad", "adadelta", "adamax", "asgd", "rprop")


def distributed(config: RunConfig) -> Iterator[Finding]:
    """A transformer over several cards: what would need all of a tensor at once is refused."""
    part, memory = config.distributed, config.memory
    if part.shard == "none":
        for name in sorted(part.model_dump(exclude_defaults=True, exclude={"config"}) if part.config is None else ()):
            fix = 'write distributed.shard = "full", or remove it'
            yield Finding(("distributed", name), f"distributed.{name} has no effect while nothing is sharded", fix)
        return
    key: KeyPath = ("distributed", "shard")
    if config.quant is not None and kind(config.quant) != "none":
        yield Finding(key, "a quantised transformer cannot be sharded", 'remove [quant], or write distributed.shard = "none"')
    for name, is_on in (
        (memory.streams, bool(memory.streams)),
        ("compile", memory.compile),
        ("fused_update", memory.fused_update != "off"),
        ("optimizer_offload", memory.optimizer_offload != "off"),
        ("modulation", memory.modulation == "lookahead"),
        ("plan", memory.plan == "auto"),
    ):
        if is_on:
            fix = "keep one of them; distributed.cpu_offload keeps shares in host memory"
            yield Finding(("memory", name), f"memory.{name} and distributed.shard exclude each other", fix)
    if config.train.precision == "fp16":
        fix = 'write train.precision = "bf16"'
        yield Finding(("train", "precision"), "a sharded run does not work with the gradient scaler of fp16", fix)
    if part.gather == "bf16" and config.train.precision not in ("auto", "bf16"):
        fix = 'write train.precision = "bf16"'
        yield Finding(("distributed", "gather"), "weights that travel in bf16 need products in bf16", fix)
    is_trained = config.adapter is None and not trains_control(config) and "dit" in config.train.components
    optim = config.optim.model_dump()
    name = optim.get("name", "") if optim["type"] == "torch" else optim["type"]
    if is_trained and name not in (*ELEMENTWISE, "adamw_bf16", "lion", "schedulefree"):
        why = f"{name} needs rows, columns or norms of whole tensors"
        fix = f"use adamw_bf16, lion, schedulefree or torch's {', '.join(ELEMENTWISE[:4])}"
        yield Finding(("optim", "type"), "this optimizer cannot update shares of tensors", fix, why)


RULES = (
    distributed,
    control,
    for_drawing,
    family_for_drawing,
    nothing_reads_conditions,
    base_is_frozen,
    fused_update,
    optimizer_offload,
    memory,
    objective,
)
