"""Configs of accelerate, FSDP and DeepSpeed as their own tools write them, and what becomes of each value."""

import json
from pathlib import Path
from typing import Any

import pytest

from fluxsmith.errors import ConfigError
from fluxsmith.io.launcher import launch_of_environment, read_launch

ACCELERATE = "compute_environment: LOCAL_MACHINE\nmachine_rank: 0\nnum_machines: 1\nnum_processes: 8\nuse_cpu: false\n"
ZERO2 = (
    ACCELERATE
    + """distributed_type: DEEPSPEED
mixed_precision: bf16
deepspeed_config:
  gradient_accumulation_steps: 1
  offload_optimizer_device: {optimizer}
  offload_param_device: {param}
  zero3_init_flag: false
  zero_stage: {stage}
"""
)
FSDP = (
    ACCELERATE
    + """distributed_type: FSDP
mixed_precision: 'no'
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_reshard_after_forward: {reshard}
  fsdp_offload_params: {offload}
  fsdp_state_dict_type: {states}
  fsdp_activation_checkpointing: {recompute}
"""
)


def written(folder: Path, text: str, name: str = "launch.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.ledger("DS-35")
@pytest.mark.ledger("ST-32")
@pytest.mark.parametrize(
    ("stage", "optimizer", "param", "shard", "offload"),
    [(0, "none", "none", "none", None), (1, "none", "none", "grads", None), (2, "none", "none", "grads", None),
     (2, "cpu", "cpu", "grads", True), (3, "none", "none", "full", None), (3, "none", "cpu", "full", True)],
)  # fmt: skip
def test_stages_of_deepspeed(tmp_path: Path, stage: int, optimizer: str, param: str, shard: str, offload: bool | None) -> None:
    launch = read_launch(written(tmp_path, ZERO2.format(stage=stage, optimizer=optimizer, param=param)))
    assert launch.changes.pop("train.precision") == "bf16"
    assert launch.changes.pop("distributed.cpu_offload", None) is offload
    assert launch.changes == {"distributed.shard": shard}
    said = "\n".join(launch.notes)
    assert f"ZeRO-{stage} is done by FSDP2" in said
    assert "gradient_accumulation_steps = 1 is not taken from here: train.accumulation of the run holds" in said
    assert "zero3_init_flag" in said


@pytest.mark.ledger("ST-32")
def test_a_file_of_deepspeed_itself(tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "bf16": {"enabled": True}, "gradient_clipping": 1.0, "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "overlap_comm": True},
        "activation_checkpointing": {"cpu_checkpointing": True}, "train_micro_batch_size_per_gpu": "auto",
    }  # fmt: skip
    path = written(tmp_path, json.dumps(tree), "ds.json")
    expected = {
        "distributed.shard": "full", "distributed.cpu_offload": True, "train.precision": "bf16", "memory.checkpointing": True,
        "memory.checkpointing_offload": True,
    }  # fmt: skip
    launch = read_launch(path)
    assert launch.changes == expected
    assert any("zero_optimization.overlap_comm" in note for note in launch.notes)
    assert any("gradient_clipping = 1.0 is not taken" in note for note in launch.notes)
    outer = ACCELERATE + "distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: ds.json\n"
    assert read_launch(written(tmp_path, outer)).changes == expected
    assert read_launch(written(tmp_path, outer + "mixed_precision: bf16\n")).changes == expected
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    assert launch_of_environment(environment).changes == expected


@pytest.mark.ledger("ST-32")
@pytest.mark.parametrize(("reshard", "shard"), [("true", "full"), ("false", "grads"), ("FULL_SHARD", "full"), ("SHARD_GRAD_OP", "grads")])
def test_fsdp(tmp_path: Path, reshard: str, shard: str) -> None:
    text = FSDP.format(reshard=reshard, offload="true", states="FULL_STATE_DICT", recompute="true")
    launch = read_launch(written(tmp_path, text))
    expected = {"distributed.shard": shard, "distributed.cpu_offload": True, "distributed.checkpoint": "full", "memory.checkpointing": True}
    assert launch.changes == expected
    assert any("fsdp_cpu_ram_efficient_loading" in note for note in launch.notes)
    plain = read_launch(written(tmp_path, FSDP.format(reshard=reshard, offload="false", states="SHARDED_STATE_DICT", recompute="false")))
    assert plain.changes == {"distributed.shard": shard}


def test_what_accelerate_says_to_its_processes() -> None:
    assert launch_of_environment({"ACCELERATE_MIXED_PRECISION": "no"}).changes == {}
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "2", "FSDP_RESHARD_AFTER_FORWARD": "none"}
    assert launch_of_environment({**fsdp, "FSDP_OFFLOAD_PARAMS": "true"}).changes == {
        "distributed.shard": "grads", "distributed.cpu_offload": True,
    }  # fmt: skip
    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none"}
    assert launch_of_environment(zero).changes == {"distributed.shard": "full"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ZERO2.format(stage=3, optimizer="nvme", param="none"), "offload_optimizer_device = nvme is not available"),
        (ZERO2.format(stage=4, optimizer="none", param="none"), "no ZeRO stage 4"),
        (ACCELERATE + "distributed_type: MEGATRON_LM\n", "MEGATRON_LM is not available"),
        ("steps: 3\n", "neither a config of accelerate nor one of DeepSpeed"),
        ("a: [", "neither YAML nor JSON"),
        (ACCELERATE + "distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: gone.json\n", "gone.json cannot be read"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_launch(written(tmp_path, text))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_launch(tmp_path / "gone.yaml")
