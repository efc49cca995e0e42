"""Names of scripts as people write them."""

import pytest

from fluxsmith.dialects.sd_scripts.scripts import find_script, split_command
from fluxsmith.errors import ConfigError


@pytest.mark.ledger("KS-52")
@pytest.mark.parametrize(
    "word",
    ["flux_extract_lora", "networks/flux_extract_lora.py", "./sd-scripts/networks/flux_extract_lora.py", "a\\b\\flux_extract_lora.py"],
)
def test_names(word: str) -> None:
    found = find_script(word)
    assert found is not None
    assert found.name == "flux_extract_lora"


@pytest.mark.ledger("KS-51")
def test_a_launcher_is_passed_over() -> None:
    words = [
        "accelerate",
        "launch",
        "--mixed_precision",
        "bf16",
        "--num_cpu_threads_per_process",
        "1",
        "flux_train_network.py",
        "--seed",
        "1",
    ]
    script, rest, launcher = split_command(words)
    assert (script.name, rest) == ("flux_train_network", ["--seed", "1"])
    assert launcher.startswith("accelerate launch")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "name one of flux_train_network"),
        (["flux_train_networks.py"], "write flux_train_network"),
        (["sdxl_train_network.py"], "is for SDXL"),
        (["accelerate", "launch", "x.py"], "name one of"),
    ],
)
def test_unknown_names(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        split_command(words)
