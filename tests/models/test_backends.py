"""Attention by name: torch's kernels agree, packages are called in their own layout, and what cannot be done is refused in time."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fluxsmith.errors import ConfigError
from fluxsmith.models.attention import attention
from fluxsmith.models.backends import PACKAGES, backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def heads() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, generator=generator) for _ in range(3))
    return q, k, v


@pytest.mark.ledger("KS-11")
@pytest.mark.parametrize("name", ["auto", "sdpa", "flash", "math"])
def test_torchs_kernels_agree(name: str) -> None:
    torch.testing.assert_close(backend(name, CPU, trains=True, masked=False)(*heads()), attention(*heads()))


@pytest.mark.ledger("KS-11")
@pytest.mark.ledger("ST-30")
@pytest.mark.parametrize(
    ("name", "device", "options", "words"),
    [
        ("cudnn", CPU, {}, "needs a CUDA device"),
        ("sage", CPU, {"trains": False}, "needs a CUDA device"),
        ("sage", CUDA, {}, "no backward pass"),
        ("sage", CUDA, {"trains": False}, "pip install sageattention"),
        ("flash3", CUDA, {}, "flash_attn_interface"),
        ("flash3", CUDA, {"masked": True}, "takes no mask"),
        ("flash", CPU, {"masked": True}, "takes no mask"),
    ],
)
def test_what_cannot_be_done_is_refused(name: str, device: torch.device, options: dict[str, bool], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        backend(name, device, **{"trains": True, "masked": False, **options})
    assert words in "\n".join(caught.value.lines())


def fake(name: str, **functions: Callable[..., Any]) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = type(sys.__spec__)(name, None)  # type: ignore[misc]
    for key, value in functions.items():
        setattr(module, key, value)
    return module


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2), None


def sageattn(q: Tensor, k: Tensor, v: Tensor, *, tensor_layout: str, is_causal: bool) -> Tensor:
    assert tensor_layout == "HND"
    assert not is_causal
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(("name", "function"), [("flash3", flash_attn_func), ("sage", sageattn)])
def test_packages_are_called_in_their_own_layout(monkeypatch: pytest.MonkeyPatch, name: str, function: Callable[..., Any]) -> None:
    module = PACKAGES[name].module
    monkeypatch.setitem(sys.modules, module, fake(module, **{function.__name__: function}))
    torch.testing.assert_close(backend(name, CUDA, trains=False, masked=False)(*heads()), attention(*heads()))
