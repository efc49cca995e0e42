"""DiffSynth-Studio's pipeline on a card: memory is managed without a change of the picture, LoRAs come and go, noise from the card."""

from pathlib import Path
from typing import Any

import diffsynth_tiny
import pytest
import torch
from diffsynth_tiny import SHORT, configs

from fluxsmith.dialects.diffsynth import FluxImagePipeline

pytestmark = pytest.mark.gpu
STATES = ("offload", "onload", "preparing", "computation")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffsynth_tiny.write_models(tmp_path_factory.mktemp("diffsynth"))


def managed(*devices: str, stored: torch.dtype = torch.float32) -> dict[str, Any]:
    types = (stored, stored, stored, torch.float32)
    return {f"{state}_device": device for state, device in zip(STATES, devices, strict=True)} | {
        f"{state}_dtype": dtype for state, dtype in zip(STATES, types, strict=True)
    }


def difference(one: bytes, other: bytes) -> int:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.ledger("DS-07")
@pytest.mark.ledger("DS-08G")
@pytest.mark.parametrize(
    ("devices", "limit"),
    [
        (("cpu", "cuda", "cuda", "cuda"), None),
        (("cuda", "cuda", "cuda", "cuda"), None),
        (("cpu", "cpu", "cpu", "cuda"), None),
        (("disk", "disk", "cuda", "cuda"), None),
        (("cpu", "cpu", "cuda", "cuda"), 0.0),
        (("disk", "disk", "cuda", "cuda"), 0.0),
    ],
)
def test_managed_memory_draws_the_same(root: Path, devices: tuple[str, ...], limit: float | None) -> None:
    plain = FluxImagePipeline.from_pretrained(torch.float32, "cuda", configs(root))
    other = FluxImagePipeline.from_pretrained(torch.float32, "cuda", configs(root, **managed(*devices)), vram_limit=limit)
    for _ in range(2):
        assert difference(other("a star", **SHORT).tobytes(), plain("a star", **SHORT).tobytes()) <= 1


@pytest.mark.ledger("DS-08G")
def test_stored_in_8_bits(root: Path) -> None:
    stored = managed("cpu", "cpu", "cuda", "cuda", stored=torch.float8_e4m3fn)
    pipe = FluxImagePipeline.from_pretrained(torch.float32, "cuda", configs(root, **stored), vram_limit=0.0)
    plain = FluxImagePipeline.from_pretrained(torch.float32, "cuda", configs(root))
    assert difference(pipe("a star", **SHORT).tobytes(), plain("a star", **SHORT).tobytes()) < 40


@pytest.mark.ledger("DS-03")
def test_noise_of_the_card_and_of_the_host(root: Path) -> None:
    pipe = FluxImagePipeline.from_pretrained(torch.bfloat16, "cuda", configs(root))
    host, card = (pipe("a star", **SHORT, rand_device=device).tobytes() for device in ("cpu", "cuda"))
    assert host != card
    assert pipe("a star", **SHORT, rand_device="cuda").tobytes() == card


@pytest.mark.ledger("DS-07")
def test_the_older_call_on_a_loaded_pipeline(root: Path) -> None:
    pipe = FluxImagePipeline.from_pretrained(torch.float32, "cuda", configs(root))
    expected = FluxImagePipeline.from_pretrained(torch.float32, "cuda", configs(root))("a star", **SHORT).tobytes()
    pipe.enable_vram_management(num_persistent_param_in_dit=0)
    assert difference(pipe("a star", **SHORT).tobytes(), expected) <= 1
