"""Management of memory: the four pairs of every ModelConfig, a limit, the older calls; the picture stays the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffsynth_tiny import FILES, SHORT, configs

from fluxsmith.dialects.diffsynth import FluxImagePipeline, ModelConfig
from fluxsmith.dialects.diffsynth.memory import legacy, rule_of, stored_as
from fluxsmith.errors import ConfigError
from fluxsmith.quant.base import QuantLinear
from fluxsmith.quant.names import options_of

F8, BF, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
STATES = ("offload", "onload", "preparing", "computation")


def pairs(places: str, dtypes: tuple[torch.dtype, ...]) -> dict[str, Any]:
    devices = places.split()
    return {f"{state}_device": device for state, device in zip(STATES, devices, strict=True)} | {
        f"{state}_dtype": dtype for state, dtype in zip(STATES, dtypes, strict=True)
    }


@pytest.mark.ledger("DS-07")
@pytest.mark.parametrize(
    ("places", "limited", "expected"),
    [
        ("cpu cuda cuda cuda", False, ("host", "device")),
        ("cpu cpu cuda cuda", True, ("host", "device")),
        ("cuda cuda cuda cuda", False, ("device", "device")),
        ("cpu cpu cpu cuda", False, ("host", "host")),
        ("disk disk cuda cuda", False, ("disk", "device")),
        ("disk disk cuda cuda", True, ("host", "disk")),
    ],
)
def test_pairs_become_rules(places: str, limited: bool, expected: tuple[str, str]) -> None:
    rule = rule_of(ModelConfig(path="x", **pairs(places, (BF,) * 4)), limited=limited)
    assert (rule.rest, rule.work) == expected
    rule.check("dit", has_refill=True)


def test_places_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="there is no device floppy"):
        rule_of(ModelConfig(path="x", **pairs("floppy cpu cpu cpu", (BF,) * 4)), limited=False)
    with pytest.raises(ConfigError, match="bitsandbytes_fp4 has no equal.*nf4"):
        options_of(stored_as(ModelConfig(path="x", quantize="bitsandbytes_fp4")), "diffsynth")


@pytest.mark.ledger("DS-07")
@pytest.mark.parametrize(("places", "limit"), [("cpu cpu cpu cpu", 0.0), ("cpu cpu cpu cpu", 50.0), ("disk disk cpu cpu", 0.0)])
def test_pictures_are_the_same_within_a_limit(
    models_root: Path, pipe: FluxImagePipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, places: str, limit: float
) -> None:
    monkeypatch.setenv("FLUXSMITH_HOME", str(tmp_path))
    other = FluxImagePipeline.from_pretrained(F32, "cpu", configs(models_root, **pairs(places, (F32,) * 4)), vram_limit=limit)
    assert all(part.device.type == "cpu" for held in (other.dit, other.text_encoder_2) if held for part in held.parameters())
    for seed in (1, 2):
        assert other("a star", **{**SHORT, "seed": seed}).tobytes() == pipe("a star", **{**SHORT, "seed": seed}).tobytes()
    assert other.dit is not None
    assert other.dit.double_blocks[0].img_attn.qkv.weight.is_meta == (limit == 0)


@pytest.mark.ledger("DS-07")
@pytest.mark.ledger("DS-08G")
def test_weights_stored_in_8_bits(models_root: Path, pipe: FluxImagePipeline) -> None:
    stored = pairs("cpu cpu cpu cpu", (F8, F8, F8, F32))
    other = FluxImagePipeline.from_pretrained(F32, "cpu", configs(models_root, **stored), vram_limit=0.0)
    assert other.dit is not None
    assert other.text_encoder_2 is not None
    for held in (other.dit, other.text_encoder_2):
        assert any(isinstance(module, QuantLinear) for module in held.modules())
    one, plain = other("a star", **SHORT), pipe("a star", **SHORT)
    assert one.tobytes() != plain.tobytes()
    assert max(abs(a - b) for a, b in zip(one.tobytes(), plain.tobytes(), strict=True)) < 40


@pytest.mark.ledger("DS-07")
def test_the_older_calls(models_root: Path, pipe: FluxImagePipeline) -> None:
    expected = pipe("a star", **SHORT).tobytes()
    for call in ({}, {"num_persistent_param_in_dit": 0}, {"vram_limit": 0.5, "vram_buffer": 0.5}):
        other = FluxImagePipeline.from_pretrained(F32, "cpu", configs(models_root, offload_device="cpu", offload_dtype=F32))
        other.enable_vram_management(**call)
        assert other("a star", **SHORT).tobytes() == expected
        assert other.dit is not None
        assert other.dit.double_blocks[0].img_attn.qkv.weight.is_meta == bool(call)
        with pytest.raises(ConfigError, match="before the first picture"):
            other.enable_cpu_offload()
    managed = legacy(torch.device("cpu"), None, 8.0, 0.5)
    assert (managed.limit, managed.is_on) == (7.5, True)


def test_unmanaged_parts_stay_where_they_are(models_root: Path) -> None:
    some = [*configs(models_root, *FILES[:3]), *configs(models_root, FILES[3], **pairs("cpu cpu cpu cpu", (BF,) * 4))]
    pipe = FluxImagePipeline.from_pretrained(BF, "cpu", some)
    assert pipe.management.rules["dit"].rest == "device"
    assert pipe.management.rules["ae"].rest == "host"
    assert pipe("a star", **SHORT).size == (48, 32)
