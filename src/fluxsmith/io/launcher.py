"""Configs of accelerate, FSDP and DeepSpeed, from files and from what `accelerate launch` puts into the environment.

`read_launch(Path("zero3.yaml"))` -> changes of the run's config by dotted key, and notes on everything that means something else here.
DeepSpeed itself is not used: its stages are those of FSDP2. Environment: ACCELERATE_*, FSDP_*.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fluxsmith.errors import ConfigError

STAGES = {0: "none", 1: "grads", 2: "grads", 3: "full"}
STRATEGIES = {
    "FULL_SHARD": "full", "1": "full", "SHARD_GRAD_OP": "grads", "2": "grads", "NO_SHARD": "none", "3": "none",
    "HYBRID_SHARD": "full", "4": "full", "HYBRID_SHARD_ZERO2": "grads", "5": "grads",
}  # fmt: skip
KINDS = {"NO": "", "MULTI_GPU": "", "MULTI_CPU": "", "DEEPSPEED": "deepspeed_config", "FSDP": "fsdp_config"}
UNITS = "auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params"  # of FSDP: what is put together at a time
FSDP_READ = (
    "version", "sharding_strategy", "reshard_after_forward", "offload_params", "state_dict_type", "activation_checkpointing",
)  # fmt: skip
DEEPSPEED_READ = (
    "zero_optimization", "bf16", "fp16", "gradient_accumulation_steps", "gradient_clipping", "activation_checkpointing",
)  # fmt: skip


@dataclass
class Launch:
    """What a launcher's config asks for."""

    changes: dict[str, Any] = field(default_factory=dict)
    """Values by dotted key of the run's config."""
    notes: list[str] = field(default_factory=list)

    def device(self, name: str, value: Any, where: str) -> None:
        """An offload: to host memory, or (refused) to NVMe."""
        kind = str(value or "none").lower()
        if kind == "nvme":
            fix = 'write "cpu", or fine-tune on one card with memory.offload = { disk = "..." }'
            raise ConfigError(f"{name} = nvme is not available", where=where, why="shares wait in host memory", fix=fix)
        if kind == "cpu":
            self.changes["distributed.cpu_offload"] = True

    def stage(self, value: Any, where: str) -> None:
        """A ZeRO stage."""
        stage = int(value) if str(value).isdigit() else -1
        if stage not in STAGES:
            raise ConfigError(f"there is no ZeRO stage {value!r}", where=where, fix="write 0, 1, 2 or 3")
        self.changes["distributed.shard"] = STAGES[stage]
        more = " (gradients are shared out too)" if stage == 1 else ""
        self.notes.append(f'ZeRO-{stage} is done by FSDP2: distributed.shard = "{STAGES[stage]}"{more}')

    def unused(self, names: list[str], why: str) -> None:
        """One note on options without a counterpart."""
        if names:
            self.notes.append(f"not used: {', '.join(sorted(names))} ({why})")


def read_launch(path: Path) -> Launch:
    """A YAML or JSON file of accelerate, or a JSON file of DeepSpeed. Raises ConfigError for anything else."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except OSError as error:
        raise ConfigError(f"{path} cannot be read", why=error.strerror or str(error), fix="correct distributed.config") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is neither YAML nor JSON", why=str(error).splitlines()[0], fix="correct the file") from error
    if isinstance(tree, dict) and ("distributed_type" in tree or "compute_environment" in tree):
        return _accelerate(tree, path)
    if isinstance(tree, dict) and ("zero_optimization" in tree or "train_micro_batch_size_per_gpu" in tree):
        launch = Launch()
        _deepspeed(launch, tree, str(path))
        return launch
    fix = "give the file that `accelerate config` wrote, or the JSON file of DeepSpeed"
    raise ConfigError(f"{path} is neither a config of accelerate nor one of DeepSpeed", fix=fix)


def launch_of_environment(environment: Mapping[str, str] | None = None) -> Launch:
    """What `accelerate launch` said to its processes; empty where it asked for nothing of this kind."""
    given, launch = os.environ if environment is None else environment, Launch()
    if given.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        options = {key.removeprefix("FSDP_").lower(): value for key, value in given.items() if key.startswith("FSDP_")}
        _fsdp(launch, {key: value for key, value in options.items() if value.lower() not in ("none", "")}, "accelerate launch")
    if given.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        prefix = "ACCELERATE_DEEPSPEED_"
        options = {key.removeprefix(prefix).lower(): value for key, value in given.items() if key.startswith(prefix)}
        if options.get("config_file", "none").lower() != "none":
            return read_launch(Path(options["config_file"]))
        _zero(launch, options, "accelerate launch")
    return launch


def _accelerate(tree: Mapping[str, Any], path: Path) -> Launch:
    kind, launch = str(tree.get("distributed_type", "NO")).upper(), Launch()
    if kind not in KINDS:
        raise ConfigError(f"distributed_type {kind} is not available", where=str(path), fix=f"use one of {', '.join(KINDS)}")
    options = dict(tree.get(KINDS[kind]) or {})
    _precision(launch, str(tree.get("mixed_precision", "no")))
    if kind == "FSDP":
        _fsdp(launch, {key.removeprefix("fsdp_"): value for key, value in options.items()}, str(path))
    elif kind == "DEEPSPEED" and options.get("deepspeed_config_file") not in (None, "none"):
        _deepspeed(launch, json.loads(_text(path.parent / str(options["deepspeed_config_file"]))), str(path))
    elif kind == "DEEPSPEED":
        _zero(launch, options, str(path))
    return launch


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read", why=error.strerror or str(error), fix="correct deepspeed_config_file") from error


def _precision(launch: Launch, name: str) -> None:
    if name in ("bf16", "fp16"):
        launch.changes["train.precision"] = name
    elif name == "fp8":
        launch.notes.append("not used: mixed_precision fp8 (products stay in 16 bits)")


def _zero(launch: Launch, options: Mapping[str, Any], where: str) -> None:
    """The options that accelerate has for DeepSpeed."""
    launch.stage(options.get("zero_stage", 2), where)
    for name in ("offload_optimizer_device", "offload_param_device"):
        launch.device(name, options.get(name), where)
    _counts(launch, options)
    known = ("zero_stage", "offload_optimizer_device", "offload_param_device", "gradient_accumulation_steps", "gradient_clipping")
    launch.unused([str(key) for key in options if key not in (*known, "deepspeed_config_file", "config_file")], "FSDP2 needs none of it")


def _deepspeed(launch: Launch, tree: Mapping[str, Any], where: str) -> None:
    """DeepSpeed's own file."""
    zero = dict(tree.get("zero_optimization") or {})
    launch.stage(zero.get("stage", 0), where)
    for name in ("offload_optimizer", "offload_param"):
        launch.device(name, (zero.get(name) or {}).get("device"), where)
    for name in ("bf16", "fp16"):
        if (tree.get(name) or {}).get("enabled") is True:
            _precision(launch, name)
    recomputes = tree.get("activation_checkpointing")
    if recomputes:
        launch.changes["memory.checkpointing"] = True
        if dict(recomputes).get("cpu_checkpointing"):
            launch.changes["memory.checkpointing_offload"] = True
    _counts(launch, tree)
    unused = [f"zero_optimization.{key}" for key in zero if key not in ("stage", "offload_optimizer", "offload_param")]
    launch.unused([*unused, *(key for key in tree if key not in DEEPSPEED_READ)], "the run's own options hold, or FSDP2 needs none of it")


def _counts(launch: Launch, options: Mapping[str, Any]) -> None:
    """Numbers that belong to the run file: said, not taken."""
    for name, key in (("gradient_accumulation_steps", "train.accumulation"), ("gradient_clipping", "train.max_grad_norm")):
        if options.get(name) not in (None, "auto"):
            launch.notes.append(f"{name} = {options[name]} is not taken from here: {key} of the run holds")


def _fsdp(launch: Launch, options: Mapping[str, Any], where: str) -> None:
    """FSDP 1 has strategies, FSDP 2 says what happens after the forward pass; `options` without the prefix."""
    reshards = str(options.get("reshard_after_forward", "")).upper()
    strategy = str(options.get("sharding_strategy", "FULL_SHARD")).upper()
    if reshards in ("TRUE", "FALSE"):
        shard = "full" if reshards == "TRUE" else "grads"
    elif (reshards or strategy) in STRATEGIES:
        shard = STRATEGIES[reshards or strategy]
    else:
        raise ConfigError(f"unknown FSDP strategy {reshards or strategy}", where=where, fix="write FULL_SHARD or SHARD_GRAD_OP")
    launch.changes["distributed.shard"] = shard
    launch.notes.append(f'FSDP: distributed.shard = "{shard}", a block at a time')
    if strategy.startswith("HYBRID") or strategy in ("4", "5"):
        launch.notes.append("hybrid sharding: shares are dealt out over the cards of all machines")
    if _is_on(options.get("offload_params")):
        launch.changes["distributed.cpu_offload"] = True
    if "FULL" in str(options.get("state_dict_type", "")).upper():
        launch.changes["distributed.checkpoint"] = "full"
    if _is_on(options.get("activation_checkpointing")):
        launch.changes["memory.checkpointing"] = True
    elsewhere = [f"fsdp_{key}" for key in options if key not in FSDP_READ and key not in UNITS]
    launch.unused(elsewhere, "FSDP2 decides it by itself")


def _is_on(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes")
