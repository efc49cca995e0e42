"""A table of steps by name: torch's where nothing else was measured, a refusal before anything is loaded where Triton cannot work."""

import sys

import pytest
import torch

from fluxsmith.errors import ConfigError
from fluxsmith.models.kernels import choice
from fluxsmith.models.kernels.choice import kernel_ops
from fluxsmith.models.ops import LEAN


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_nothing_unmeasured_is_chosen(name: choice.Name) -> None:
    assert kernel_ops(name, torch.device("cuda")) is LEAN


def test_without_a_card() -> None:
    with pytest.raises(ConfigError, match="CUDA"):
        kernel_ops("triton", torch.device("cpu"))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="package triton"):
        kernel_ops("triton", torch.device("cuda"))


def test_with_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module behind the door is asked for by its name only then."""
    monkeypatch.setattr(choice, "find_spec", lambda name: name)
    table = type(sys)("table")
    table.TRITON = LEAN._replace(gate=LEAN.gate)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fluxsmith.models.kernels.table", table)
    assert kernel_ops("triton", torch.device("cuda")) is table.TRITON  # type: ignore[attr-defined]
