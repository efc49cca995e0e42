"""What a launcher asks for reaches the run, unless the run file says otherwise; the run folder keeps what holds."""

from collections.abc import Callable
from pathlib import Path

import pytest
from ran import Go

from fluxsmith.config.load import load_config
from fluxsmith.config.schema import RunConfig
from fluxsmith.errors import ConfigError
from fluxsmith.train.launch import launched

ZERO3 = '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}, "bf16": {"enabled": true}}'


@pytest.fixture
def zero3(tmp_path: Path) -> str:
    path = tmp_path / "zero3.json"
    path.write_text(ZERO3)
    return str(path)


@pytest.mark.ledger("DS-35")
@pytest.mark.ledger("ST-32")
def test_a_file_fills_what_the_run_leaves_open(run_config: Callable[..., RunConfig], zero3: str) -> None:
    config, notes = launched(run_config({"distributed.config": zero3}))
    assert (config.distributed.shard, config.distributed.cpu_offload, config.train.precision) == ("full", True, "bf16")
    assert config.distributed.config is None
    assert notes == ['ZeRO-3 is done by FSDP2: distributed.shard = "full"']


def test_the_run_file_comes_first(run_config: Callable[..., RunConfig], zero3: str) -> None:
    config, notes = launched(run_config({"distributed.config": zero3, "distributed.shard": "grads", "train.precision": "no"}))
    assert (config.distributed.shard, config.train.precision) == ("grads", "no")
    assert "distributed.shard = 'grads' of the run file holds, the launcher says 'full'" in notes


def test_accelerate_speaks_through_the_environment(run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched(run_config())[1] == []
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    assert launched(run_config())[0].distributed.shard == "grads"


def test_what_does_not_go_together_is_refused(run_config: Callable[..., RunConfig], zero3: str) -> None:
    changes = {
        "distributed.config": zero3,
        "memory.checkpointing": True,
        "memory.stream_blocks": "all",
        "memory.optimizer_offload": "states",
    }
    with pytest.raises(ConfigError, match="does not go with the run file") as error:
        launched(run_config(changes))
    assert "zero3.json" in " ".join(error.value.lines())


@pytest.mark.ledger("DS-35")
def test_offload_in_one_process_keeps_states_on_the_host(go: Go, zero3: str) -> None:
    """The same as memory.optimizer_offload, said aloud; the folder keeps the values, not the file's name."""
    ran = go({"distributed.config": zero3, "train.precision": "no"})
    assert ran.error is None
    assert "no effect in one process; optimizer states wait in host memory" in ran.warnings
    assert "ZeRO-3 is done by FSDP2" in ran.warnings
    kept = load_config(ran.folder / "run.toml").config.distributed
    assert (kept.config, kept.shard, kept.cpu_offload) == (None, "full", True)
