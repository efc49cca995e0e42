"""DoRA: the three rules of strength, norms per output and per input, gradients, and files of both words."""

from pathlib import Path

import pytest
import torch
from small_layer import changed, follows_its_delta, layer, random, whole
from torch import Tensor

from fluxsmith.adapters.dora import Config
from fluxsmith.adapters.formats.files import read_adapter, write_adapter
from fluxsmith.adapters.formats.verdict import verdict
from fluxsmith.adapters.load import load_adapter, with_rule
from fluxsmith.errors import ConfigError
from fluxsmith.models.flux import FluxDiT

QKV = "dit.double_blocks.0.img_attn.qkv"


def formula(weight: Tensor, delta: Tensor, magnitude: Tensor, strength: float, rule: str) -> Tensor:
    dim = 1 if magnitude.shape[1] == 1 else 0
    if rule == "peft":
        summed = weight + strength * delta
        return summed * magnitude / summed.norm(dim=dim, keepdim=True)
    summed = weight + delta
    gain = magnitude / summed.norm(dim=dim, keepdim=True)
    return summed * (strength * (gain - 1) + 1) if rule == "lycoris" else weight + strength * (summed * gain - weight)


@pytest.mark.ledger("ST-12")
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("per", ["output", "input"])
@pytest.mark.parametrize("rule", ["lycoris", "interpolated", "peft"])
def test_formula(rule: str, per: str, strength: float) -> None:
    t = {"down": random(2, 12), "up": random(36, 2), "magnitude": random(36, 1).abs() + 1 if per == "output" else random(1, 12).abs() + 1}
    base, adapter, x = layer(whole("lora", 3.0, rule, **t), strength)
    wanted = formula(base.weight, 1.5 * t["up"] @ t["down"], t["magnitude"], strength, rule)
    assert (changed(base, x) - x @ wanted.T).abs().max() < 1e-12
    assert follows_its_delta(base, adapter, x)


def test_the_rules_agree_at_full_strength() -> None:
    t = {"down": random(2, 12), "up": random(36, 2), "magnitude": random(36, 1).abs() + 1}
    torch.manual_seed(0)
    outs = []
    for rule in ("lycoris", "interpolated", "peft"):
        torch.manual_seed(1)
        base, _, x = layer(whole("lora", 3.0, rule, **t))
        outs.append(base(x))
    assert all(torch.allclose(out, outs[0]) for out in outs)


def test_held_norms_have_no_gradient() -> None:
    """PEFT's way: the factors' gradient is that with the norm as a constant."""
    t = {"down": random(2, 12), "up": random(36, 2), "magnitude": random(36, 1).abs() + 1}
    grads = {}
    for rule in ("peft", "interpolated"):
        torch.manual_seed(1)
        base, adapter, x = layer(whole("lora", 2.0, rule, **t))
        base(x).square().sum().backward()
        grads[rule] = {name: param.grad for name, param in adapter.tensors().items()}
    assert torch.allclose(grads["peft"]["magnitude"], grads["interpolated"]["magnitude"])
    assert not torch.allclose(grads["peft"]["up"], grads["interpolated"]["up"])


@pytest.mark.ledger("ST-12")
@pytest.mark.parametrize(("form", "loads", "lost"), [("kohya", "ComfyUI", "diffusers"), ("peft", "diffusers", "ComfyUI")])
@pytest.mark.parametrize("split", [False, True])
def test_files(dit: FluxDiT, tmp_path: Path, split: bool, form: str, loads: str, lost: str) -> None:
    """Both kinds of file hold the same; each names the loader that drops its magnitudes."""
    made = Config(rank=3, alpha=2, split_qkv=split, targets="blocks").build({"dit": dit})
    with torch.no_grad():
        for param in made.params.values():
            param.add_(torch.randn(param.shape) * 0.3)
    x = torch.randn(2, 64)
    wanted = made.bases[QKV](x)
    write_adapter(tmp_path / "a.safetensors", made.state(), format=form, dtype=None)  # type: ignore[arg-type]
    made.detach()
    found = verdict(tmp_path / "a.safetensors")
    assert loads in found.loads_in
    assert any("dora_scale" in key or "magnitude" in key for key in found.lost[lost])
    again = load_adapter(tmp_path / "a.safetensors", {"dit": dit})
    assert torch.allclose(again.bases[QKV](x), wanted, atol=1e-5)


def test_start_holds_the_norms_of_the_base(dit: FluxDiT) -> None:
    made = Config(rank=2, split_qkv=True).build({"dit": dit})
    rows = made.bases[QKV].weight[64:128]
    assert torch.allclose(made.params[f"{QKV}.k.magnitude"], rows.norm(dim=1, keepdim=True))


def test_an_unknown_rule_is_refused(fixtures_root: Path) -> None:
    with pytest.raises(ConfigError, match="no DoRA rule 'comfy'.*lycoris, interpolated, peft"):
        with_rule(read_adapter(fixtures_root / "flux-dev-lora-tiny/lycoris_dora.safetensors"), "comfy")
