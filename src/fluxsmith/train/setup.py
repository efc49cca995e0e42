"""A config becomes parts: models on their device, data prepared, what is trained, optimizer, plan of batches.

Order matters for memory: text encoders and autoencoder fill the caches and the sample prompts, then leave; only
then is the transformer loaded.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from fluxsmith.adapters.lora import load_adapter
from fluxsmith.config.choice import realise
from fluxsmith.config.optimizer import OptimizerConfig
from fluxsmith.config.schema import RunConfig
from fluxsmith.config.section import PluginConfig
from fluxsmith.controls.base import Site
from fluxsmith.data.checks import check_fits
from fluxsmith.data.dataset import PreparedData, prepare
from fluxsmith.data.types import Encoders
from fluxsmith.events import Bus, PhaseStarted, Warned
from fluxsmith.memory.block_swap import BlockSwap, checked, streaming
from fluxsmith.memory.checkpoint import checkpoint_blocks, modes_of
from fluxsmith.memory.masters import Host, move_resident
from fluxsmith.memory.modulation import LookAhead
from fluxsmith.memory.trained_swap import TrainedSwap
from fluxsmith.models.assembly import Control, Models, TextStates
from fluxsmith.models.backends import backend
from fluxsmith.models.compiling import compile_blocks
from fluxsmith.models.family.base import FamilyFacts
from fluxsmith.models.files import ModelFiles, locate
from fluxsmith.models.fill import ByBlock
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.kernels.choice import kernel_ops
from fluxsmith.models.loading import LazyModels, Loading
from fluxsmith.models.ops import REFERENCE, use, use_attention
from fluxsmith.quant.base import by_block, quantise
from fluxsmith.train.distributed import World
from fluxsmith.train.ema import Ema
from fluxsmith.train.host_optimizer import update_at
from fluxsmith.train.lookahead import Refill, obstacle
from fluxsmith.train.plan import BatchPlan
from fluxsmith.train.planning import planned
from fluxsmith.train.sharding import shard
from fluxsmith.train.trained import DTYPES, Trained, train_adapter, train_modules


@dataclass
class Parts:
    """Everything the loop needs."""

    config: RunConfig
    world: World
    models: Models
    files: ModelFiles
    trained: Trained
    objective: Any
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    data: PreparedData
    plan: BatchPlan
    total_steps: int
    prompts: dict[str, TextStates] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    refill: Refill | None = None  # with modulation look-ahead: to be called before each step
    started_at: float = field(default_factory=time.time)  # Unix time, for metadata only


def build(config: RunConfig, world: World, bus: Bus) -> Parts:
    """All parts for `config`. Raises the error of whatever is wrong, before the first step."""
    bus.send(PhaseStarted("load", "reading headers"))
    files = locate(config.model)
    objective = realise(config.objective).build(config.noise, config.train.seed)
    if isinstance(config.optim, OptimizerConfig):
        realise(config.optim).require()
    if config.quant is not None:
        bus.send(PhaseStarted("quantise", realise(config.quant).require(world.device)))
    roles = roles_needed(config, objective)
    files.check(roles)
    # What the device cannot compute is refused now rather than after an hour of caching.
    kernel_ops(config.memory.kernels, world.device)
    backend(config.memory.attention, world.device, trains=True, masked=family(config).mask_text)
    lazy = LazyModels(files, config.model, world.device, _loading(config, world))

    data = _prepare(config, objective, lazy, world, bus)
    prompts = _encode_prompts(config, lazy)
    lazy.free(keep=roles_in_loop(config, objective))
    bus.send(PhaseStarted("load", "loading the model"))
    models = lazy.get(roles_in_loop(config, objective))
    models.is_clip_live = encodes_live(config) == ("clip_l",)
    parts = equip(config, models, Material(objective, data, files), world, bus)
    parts.prompts = prompts
    parts.facts = {"data": data.digest, "models": files.digests(roles), "world_size": world.size}
    return parts


class Material(NamedTuple):
    """What a run works on, beside the models."""

    objective: Any
    data: PreparedData
    files: ModelFiles


def equip(config: RunConfig, models: Models, material: Material, world: World, bus: Bus) -> Parts:
    """Loaded models become parts of a run: frozen, quantised, adapted, with optimizer and plan, and each where its memory is."""
    objective, data, files = material
    for module in models.loaded().values():
        module.requires_grad_(False)
    if hasattr(objective, "start"):
        objective.start(models)
    _merge_adapters(config, models)
    if config.quant is not None and models.dit is not None:
        quantise(realise(config.quant), "dit", models.dit)
    models.controls = _controls(config, models)
    trained = _dealt(_trained(config, models), models, config, world, bus)
    models.adapters = trained.adapters
    host = Host(pin=world.device.type == "cuda", say=lambda text: bus.send(Warned(text)))
    lookahead = _look_ahead(config, models, (world.device, host), obstacle(config, models, trained, objective), bus)
    refill = None if lookahead is None else Refill(lookahead, models, objective, data, world)
    swap = _memory(config, models, trained, (world.device, host))
    trained = update_at(trained, config, swap, world, host)
    optimizer = realise(config.optim).build(trained.groups)
    plan = BatchPlan(data.batches, config.train.accumulation, world.size)
    ema = Ema(trained.params, config.train.ema.decay) if config.train.ema else None
    total = plan.total_steps(config.train.steps, config.train.epochs)
    return Parts(config, world, models, files, trained, objective, optimizer, ema, data, plan, total, refill=refill)


def _merge_adapters(config: RunConfig, models: Models) -> None:
    """`base_adapters` become part of the frozen base."""
    for entry in config.base_adapters:
        load_adapter(entry.path, models.loaded(), strength=entry.strength, name="base").merge()


def _controls(config: RunConfig, models: Models) -> tuple[Control, ...]:
    if not config.control:
        return ()
    if models.dit is None:
        raise ValueError("control models need the transformer")
    dtype, base = DTYPES[config.train.weights_dtype], models.dit.dtype
    made = []
    for entry in config.control:
        is_trained = is_control_trained(entry)
        site = Site(models.dit, dtype if is_trained else base, next(models.dit.parameters()).device, config.train.seed)
        made.append(realise(entry).build(site))
        for net in made[-1].nets:
            net.requires_grad_(False)
    return tuple(made)


def is_control_trained(entry: PluginConfig) -> bool:
    """True for the control model that the run trains."""
    return bool(entry.model_dump().get("train", False))


def _trained(config: RunConfig, models: Models) -> Trained:
    dtype = DTYPES[config.train.weights_dtype]
    if config.adapter is not None:
        return train_adapter(models, config.adapter, seed=config.train.seed, dtype=dtype)
    pairs = zip(models.controls, config.control, strict=True)
    nets = {control.role: control.nets[0] for control, entry in pairs if is_control_trained(entry)}
    return train_modules(nets or {role: models.part(role) for role in config.train.components}, dtype)


def _dealt(trained: Trained, models: Models, config: RunConfig, world: World, bus: Bus) -> Trained:
    """The transformer over all cards, where that is wanted."""
    if config.distributed.shard == "none" or models.dit is None:
        return trained
    if world.size == 1:
        offloads = "; optimizer states wait in host memory" if config.distributed.cpu_offload and trained.adapters is None else ""
        bus.send(Warned(f'distributed.shard = "{config.distributed.shard}" has no effect in one process{offloads}'))
        return trained
    return shard(trained, models.dit, config.distributed, world)


def _loading(config: RunConfig, world: World) -> Loading:
    """A transformer of which parts stay on the host may be put together there; quantised text encoders have caches of their own."""
    device, is_dealt = world.device, config.distributed.shard != "none" and world.size > 1
    by_host = device.type == "cuda" and (is_dealt or planned(config, on_card=True).job.by_host)
    place = torch.device("cpu") if by_host else None
    if config.quant is None:
        return Loading(base_dtype(config, device), place)
    options = config.quant.model_dump()
    form = json.dumps(options, sort_keys=True, default=str) if options.get("text_encoders") else ""
    quant = realise(config.quant)

    def blockwise(role: str) -> ByBlock | None:
        """A base that adapters are merged into first is quantised after that, as a whole."""
        return None if config.base_adapters else by_block(quant, role, device)

    return Loading(base_dtype(config, device), place, lambda role, module: quantise(quant, role, module), blockwise, form)


def base_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """The type the transformer is loaded in: that of the trained weights, or of the frozen base beside an adapter."""
    if "dit" in trained_components(config) and config.adapter is None:
        return DTYPES[config.train.weights_dtype]
    if config.train.base_dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return DTYPES[config.train.base_dtype]


def _look_ahead(config: RunConfig, models: Models, place: tuple[torch.device, Host], why_not: str, bus: Bus) -> LookAhead | None:
    """Modulation weights leave the device where the config wants it and nothing needs them there; said aloud where something does."""
    device, host = place
    wish = config.memory.modulation
    if models.dit is None or not _wants_lookahead(config, device):
        return None
    if why_not:
        if wish == "lookahead" or "no modulation layers" not in why_not:
            bus.send(Warned(f"modulation weights stay on the device: {why_not}"))
        return None
    made = LookAhead(models.dit, device, host=host)
    made.attach()
    return made


def _wants_lookahead(config: RunConfig, device: torch.device) -> bool:
    """On the CPU, weights that leave the device would gain nothing: only where it is asked for. Shares are small already."""
    if config.distributed.shard != "none":
        return False
    return config.memory.modulation == "lookahead" or (config.memory.modulation == "auto" and device.type == "cuda")


def _memory(config: RunConfig, models: Models, trained: Trained, place: tuple[torch.device, Host]) -> TrainedSwap | None:
    """Everything where it belongs; returns the trained blocks that are swapped, if any."""
    if models.dit is None:
        return None
    dit, memory, (device, host) = models.dit, config.memory, place
    use(dit, REFERENCE if memory.reference_rounding else kernel_ops(memory.kernels, device))
    attend = backend(memory.attention, device, trains=True, masked=models.mask_text)
    for net in (dit, *(net for control in models.controls for net in control.nets)):
        use_attention(net, attend)
    depth, depth_single = dit.params.depth, dit.params.depth_single_blocks
    how = streaming(memory, depth, depth_single)
    modes = modes_of(memory, depth, depth_single)
    swap: BlockSwap | TrainedSwap | None = None
    if how.indices:
        checked(how, [mode in ("boundary", "offloaded") for mode in modes])
        masters = host if memory.offload is None or memory.offload.disk is None else replace(host, disk=memory.offload.disk)
        is_trained = any(name.startswith("dit.") for name in trained.params) and trained.adapters is None
        swap = (TrainedSwap if is_trained else BlockSwap)(dit, how, device, host=masters)
        swap.attach()
    if not trained.placement.is_shared:  # shares are where they belong
        move_resident(dit, device, swap.home if isinstance(swap, TrainedSwap) else ())
    if memory.checkpointing:
        checkpoint_blocks(dit, modes)
        for net in (net for control in models.controls for net in control.nets):
            if isinstance(net, FluxDiT):
                checkpoint_blocks(net, offload=memory.checkpointing_offload)
    if memory.compile:
        compile_blocks(dit, memory.compile_lengths)
    return swap if isinstance(swap, TrainedSwap) else None


def trained_components(config: RunConfig) -> tuple[str, ...]:
    """Roles whose weights (or adapters) are trained."""
    if config.adapter is not None:
        return ("dit", *config.adapter.model_dump().get("text_encoders", ()))
    return () if any(is_control_trained(entry) for entry in config.control) else config.train.components


def encodes_live(config: RunConfig) -> tuple[str, ...]:
    """Text encoders that run in every step. While T5 is not trained its states can be cached beside a CLIP-L that is."""
    trained = trained_components(config)
    if config.cache.text == "off" or "t5xxl" in trained:
        return family(config).text_roles
    return ("clip_l",) if "clip_l" in trained else ()


def family(config: RunConfig) -> FamilyFacts:
    """What the model's family tells beyond its files."""
    return realise(config.model).facts()


def roles_in_loop(config: RunConfig, objective: Any) -> tuple[str, ...]:
    """Parts that stay loaded while training."""
    roles = [*objective.components, *trained_components(config)]
    if objective.wants_latents and config.cache.latents == "off":
        roles.append("ae")
    if objective.wants_latents:
        roles += family(config).text_roles if hasattr(objective, "start") else encodes_live(config)
    if (config.sample or config.control) and objective.wants_latents:
        roles.append("ae")  # for pictures, and for conditions that are encoded
    return tuple(dict.fromkeys(roles))


def roles_needed(config: RunConfig, objective: Any) -> tuple[str, ...]:
    """Parts whose files must be there at the start."""
    roles = [*roles_in_loop(config, objective)]
    if objective.wants_latents:
        roles += ["ae", *family(config).text_roles]
    return tuple(dict.fromkeys(roles))


def _prepare(config: RunConfig, objective: Any, lazy: LazyModels, world: World, bus: Bus) -> PreparedData:
    """Caches are filled by the main process; the others then find them complete."""
    wants_text = objective.wants_latents and "t5xxl" not in encodes_live(config)
    encoders = Encoders(
        latents=lazy.encode_pixels if objective.wants_latents and config.cache.latents != "off" else None,
        latents_digest=lazy.latents_digest() if objective.wants_latents else "",
        text=lazy.encode_text if wants_text else None,
        text_digest=lazy.text_digest() if wants_text else "",
        token_counts=lazy.token_counts if objective.wants_latents else None,
    )
    data = None
    for turn in (True, False):
        if world.is_main is turn:
            data = prepare(
                config.data, cache=config.cache, seed=config.train.seed, encoders=encoders, bus=bus, run_dir=config.run.dir
            ).hold_out(config.validation)
        world.barrier()
    if data is None:
        raise RuntimeError("no process prepared the data")
    for line in check_fits(data.batches(0), data.batch_sizes, accumulation=config.train.accumulation, world=world.size):
        bus.send(Warned(line))
    return data


def _encode_prompts(config: RunConfig, lazy: LazyModels) -> dict[str, TextStates]:
    """Text states of all sample prompts, made while the encoders are loaded; nothing where encoders stay anyway."""
    texts: Sequence[str] = list(dict.fromkeys(t for s in config.sample for t in (s.prompt, s.negative)))
    return {text: lazy.encode_text([text]) for text in texts} if texts and "t5xxl" not in encodes_live(config) else {}
