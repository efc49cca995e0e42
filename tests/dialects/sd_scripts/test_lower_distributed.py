"""DeepSpeed's options become shares by FSDP2, or are refused."""

from collections.abc import Callable

import pytest

from fluxsmith.dialects.sd_scripts.lower import lower
from fluxsmith.errors import ConfigError


@pytest.mark.ledger("KS-53")
@pytest.mark.parametrize(
    ("words", "section"),
    [
        ([], {"shard": "grads"}),
        (["--zero_stage", "1"], {"shard": "grads"}),
        (["--zero_stage", "3"], {"shard": "full"}),
        (["--offload_optimizer_device", "cpu"], {"shard": "grads", "cpu_offload": True}),
        (["--zero_stage", "3", "--offload_param_device", "cpu", "--zero3_save_16bit_model"], {"shard": "full", "cpu_offload": True}),
    ],
)
def test_stages(command: Callable, words: list[str], section: dict[str, object]) -> None:
    made = command("--deepspeed", *words, script="flux_train")
    assert made.tree["distributed"] == section
    assert "is done by FSDP2" in made.noted


def test_stage_zero_shares_nothing(command: Callable) -> None:
    assert command("--deepspeed", "--zero_stage", "0", "--offload_param_device", "cpu", script="flux_train").tree["distributed"] == {}


def test_settings_without_it_have_no_effect(command: Callable) -> None:
    made = command("--zero_stage", "3", "--offload_optimizer_device", "cpu", script="flux_train")
    assert made.tree["distributed"] == {}
    assert made.noted.count("has no effect without --deepspeed") == 2


def test_what_cannot_be_done(command: Callable, base_words: list[str]) -> None:
    assert "--offload_param_device nvme is not available" in command("--deepspeed", "--offload_param_device", "nvme").refused
    with pytest.raises(ConfigError, match="--blocks_to_swap: memory.swap_blocks and distributed.shard exclude each other"):
        lower([*base_words, "--deepspeed", "--blocks_to_swap", "8"])
