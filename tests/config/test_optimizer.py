"""Options of optimizers in a run file: misspellings and options without effect are told when the file is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxsmith.config.load import load_config
from fluxsmith.errors import ConfigError

Make = Callable[..., dict[str, Any]]
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt": (
        {"optim": {"type": "prodigy", "options": {"d_coeff": 1}}},
        r"optim\.options\.d_coeff.*has no option d_coeff: write d_coef",
    ),
    "rate among the options": ({"optim": {"type": "bnb", "options": {"lr": 1}}}, "write optim.lr"),
    "of another method": ({"optim": {"type": "torch", "name": "sgd", "options": {"betas": [0.9, 0.99]}}}, "sgd has no option betas"),
    "own rate and a schedule": (
        {"optim": {"type": "adafactor", "options": {"relative_step": True}}, "schedule": {"name": "cosine"}},
        "the optimizer makes its own rate",
    ),
    "own rate and a warm-up": (
        {"optim": {"type": "adafactor", "options": {"relative_step": True}}, "schedule": {"warmup": 1}},
        "the optimizer makes its own rate",
    ),
}


@pytest.mark.ledger("KS-09")
@pytest.mark.parametrize("case", CASES)
def test_told_at_once(tiny_run: Make, tmp_path: Path, case: str) -> None:
    changes, said = CASES[case]
    with pytest.raises(ConfigError, match=said):
        load_config(tiny_run(tmp_path / "run", changes))


def test_other_names_of_the_same_option(tiny_run: Make, tmp_path: Path) -> None:
    options = {"weight_decouple": True, "bias_correction": True, "epsilon": 1e-6}
    config = load_config(tiny_run(tmp_path / "run", {"optim": {"type": "prodigy", "options": options}})).config
    assert config.optim.model_dump()["options"] == options
