"""What makes a run this run: keys that must not change for an exact continuation, and the diff when they did.

Classes of config keys (docs/explanation/exact-resume.md): identity (refused), layout (the same up to the order of sums), schedule
(a note), free (silent).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fluxsmith.config.distributed import DistributedConfig
from fluxsmith.config.schema import RunConfig, as_plain
from fluxsmith.errors import ConfigError, Problem

FREE = (
    "run", "sample", "sinks", "checkpoint", "validation.every", "validation.every_epochs", "validation.max_batches", "cache",
    "train.dry_step", "train.device", "train.first_step", "train.first_epoch",  # a state knows its own step
    "memory.checkpointing", "memory.checkpointing_offload", "memory.checkpointing_interval", "memory.checkpointing_plan",  # the same bits,
    "memory.swap_blocks", "memory.stream_blocks", "memory.offload", "memory.plan", "memory.card",  # the first cures for a lack of memory
    "distributed.checkpoint", "distributed.config",  # either kind of state is read
    "model.path", "model.clip_l", "model.t5xxl", "model.ae",  # the files' digests count, not where they lie
)  # fmt: skip
FREE_OF_DATASET = ("path", "name", "mask_dir", "condition_dir")  # the pictures' digests count
LAYOUT = ("distributed",)  # how the work is dealt out: another order of sums
PER_STEP = ("facts.world_size", "train.accumulation")  # layout too, while their product stays: the same pictures in each step
SCHEDULE = ("train.steps", "train.epochs", "schedule", "optim.lr")


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain values as dotted keys."""
    if isinstance(value, Mapping) and value:
        return {k: v for key, part in value.items() for k, v in flatten(part, f"{prefix}.{key}" if prefix else str(key)).items()}
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return {k: v for i, part in enumerate(value) for k, v in flatten(part, f"{prefix}.{i}").items()}
    return {prefix: value}


def _in(key: str, group: Sequence[str]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in group)


def _is_free(key: str) -> bool:
    parts = key.split(".")
    return _in(key, FREE) or (parts[0] == "data" and len(parts) == 3 and parts[2] in FREE_OF_DATASET)


def identity_of(config: RunConfig, facts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(identity, schedule) as dotted keys; `facts` adds digests of data and model files, world size, threads."""
    plain = flatten(as_plain(config))
    schedule = {key: value for key, value in plain.items() if _in(key, SCHEDULE)}
    identity = {key: value for key, value in plain.items() if not _is_free(key) and not _in(key, SCHEDULE)}
    if identity["memory.optimizer_offload"] == "states":  # the same bits
        identity["memory.optimizer_offload"] = "off"
    return {**identity, **flatten(facts, "facts")}, schedule


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What the bits depend on beside the config."""
    facts: dict[str, Any] = {"torch": torch.__version__, "device": device.type}
    if device.type == "cpu":
        facts["threads"] = torch.get_num_threads()
    else:
        facts["card"] = torch.cuda.get_device_name(device)
    return facts


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str]) -> list[str]:
    """Keys that changed and were allowed, or change no more than the order of sums; raises ConfigError with a diff for others."""
    saved = {**{key: value for key, value in _added().items() if key in now}, **saved}
    changed = [key for key in sorted({*saved, *now}) if saved.get(key) != now.get(key) and not _is_free(key)]
    layout = (*LAYOUT, *PER_STEP) if _per_step(saved) == _per_step(now) else LAYOUT
    refused = [key for key in changed if not _in(key, (*allowed, *layout))]
    if refused:
        problems = tuple(
            Problem(
                f"{key} was {_short(saved.get(key))} when the run was saved and is {_short(now.get(key))} now",
                fix=f"{_cure(key, saved, now)}, or continue inexactly with --allow-change {key}",
            )
            for key in refused
        )
        raise ConfigError("the run cannot be continued exactly", problems=problems)
    return changed


def _added() -> dict[str, Any]:
    """Options that states of earlier versions do not know, as these versions computed."""
    return {"memory.optimizer_offload": "off", **{f"distributed.{key}": value for key, value in as_plain(DistributedConfig()).items()}}


def _per_step(identity: Mapping[str, Any]) -> int:
    """Micro-batches of an optimizer step, over all processes."""
    return math.prod(int(identity.get(key) or 1) for key in PER_STEP)


def _cure(key: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    count, size = _per_step(saved), int(now.get("facts.world_size") or 1)
    if key not in PER_STEP or count % size:
        return "set it back"
    return f"write train.accumulation = {count // size} (a step has {count} micro-batches)"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
