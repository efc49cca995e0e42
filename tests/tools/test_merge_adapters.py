"""Merged adapters do what all of them do, each strength once; what has no exact sum is refused with the reason."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import deltas_of, metadata_of, tensors_of
from torch import Tensor

from fluxsmith.adapters.formats.files import read_adapter
from fluxsmith.adapters.load import delta_of
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.tools.merge import MergeRequest, merge_into_model
from fluxsmith.tools.merge_adapters import AdapterMergeReport, AdapterMergeRequest, merge_adapters

MakeLora = Callable[..., Path]
LoraFile = Callable[[str], Path]


def merge(target: Path, *adapters: tuple[Path, float], **options: Any) -> AdapterMergeReport:
    return merge_adapters(AdapterMergeRequest(adapters, target, **options))


def added(*adapters: tuple[Path, float], base: Path | None = None) -> dict[str, Tensor]:
    """The sum of strength * delta by layer."""
    made: dict[str, Tensor] = {}
    for path, strength in adapters:
        for name, delta in deltas_of(path, base).items():
            made[name] = made.get(name, torch.zeros_like(delta)) + strength * delta
    return made


def farthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.ledger("KS-47")
@pytest.mark.parametrize("form", ["kohya", "peft", "ai_toolkit", "comfy"])
def test_sum_is_exact(make_lora: MakeLora, tmp_path: Path, form: str) -> None:
    """Ratios count once (sd-scripts squares them), without cross terms, over different ranks, alphas and layers."""
    layers = ("single_blocks.2.linear1", "double_blocks.1.img_mlp.2")
    both = (make_lora("a", seed=1, rank=3, alpha=2.0), 0.5), (make_lora("b", seed=2, rank=5, alpha=7.0, layers=layers), -0.3)
    report = merge(tmp_path / "out.safetensors", *both, format=form)
    assert farthest(deltas_of(tmp_path / "out.safetensors"), added(*both)) < 1e-6
    assert 8 in report.ranks
    assert report.residual == 0


@pytest.mark.ledger("KS-47")
def test_one_lora_at_a_ratio_keeps_its_factors(make_lora: MakeLora, tmp_path: Path) -> None:
    """sd-scripts makes a quarter of it at ratio 0.5."""
    lora = make_lora("a", seed=1, dtype=torch.bfloat16)
    merge(tmp_path / "out.safetensors", (lora, 0.5))
    before, after = tensors_of(lora), tensors_of(tmp_path / "out.safetensors")
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor * 0.5 if name.endswith("alpha") else tensor), name
    assert metadata_of(tmp_path / "out.safetensors")["ss_network_alpha"] == "1.0"


def test_files_of_different_formats_and_split_layers(lora_file: LoraFile, base: Path, tmp_path: Path) -> None:
    """q, k and v apart in one file and together in the other."""
    both = (lora_file("kohya"), 0.5), (lora_file("kohya_split_qkv"), 0.25), (lora_file("diffusers_peft"), 0.125)
    merge(tmp_path / "out.safetensors", *both)
    assert farthest(deltas_of(tmp_path / "out.safetensors"), added(*both)) < 1e-6
    xlabs = (lora_file("xlabs"), 1.0), (lora_file("xlabs"), 0.5)
    merge(tmp_path / "xlabs.safetensors", *xlabs)
    assert farthest(deltas_of(tmp_path / "xlabs.safetensors", base), added(*xlabs, base=base)) < 1e-6
    mixed = (lora_file("xlabs"), 1.0), (lora_file("kohya"), 0.5)
    merge(tmp_path / "mixed.safetensors", *mixed, format="kohya")
    assert farthest(deltas_of(tmp_path / "mixed.safetensors"), added(*mixed, base=base)) < 1e-6


@pytest.mark.ledger("KS-47")
def test_merged_loras_do_what_both_do(base: Path, make_lora: MakeLora, tmp_path: Path) -> None:
    both = (make_lora("a", seed=1), 0.5), (make_lora("b", seed=2, rank=6), 1.5)
    merge(tmp_path / "ab.safetensors", *both)
    for name, adapters in (("one", ((tmp_path / "ab.safetensors", 1.0),)), ("two", both)):
        merge_into_model(MergeRequest({"dit": base}, {"dit": tmp_path / f"model-{name}.safetensors"}, adapters))
    assert farthest(tensors_of(tmp_path / "model-one.safetensors"), tensors_of(tmp_path / "model-two.safetensors")) < 1e-5


@pytest.mark.ledger("KS-47")
def test_cut_down_by_svd(make_lora: MakeLora, tmp_path: Path) -> None:
    """No LoRA of that rank is nearer to the sum; at the full rank nothing is lost."""
    both = (make_lora("a", seed=1, rank=3), 0.5), (make_lora("b", seed=2, rank=5), -0.3)
    expected = added(*both)
    report = merge(tmp_path / "out.safetensors", *both, how="svd", rank=2)
    made = deltas_of(tmp_path / "out.safetensors")
    shares = []
    for name, delta in expected.items():
        values = torch.linalg.svdvals(delta)
        best = float(values[2:].square().sum())
        assert float((made[name] - delta).square().sum()) == pytest.approx(best, rel=1e-3)
        shares.append(best / float(values.square().sum()))
    assert report.ranks == {2: 4}
    assert report.residual == pytest.approx(max(shares), rel=1e-3)
    assert merge(tmp_path / "default.safetensors", *both, how="svd").ranks == {5: 4}  # the larger of the two
    full = merge(tmp_path / "full.safetensors", *both, how="svd", rank=8)
    assert full.residual < 1e-6
    assert farthest(deltas_of(tmp_path / "full.safetensors"), expected) < 1e-5


@pytest.mark.ledger("KS-47")
@pytest.mark.parametrize("how", ["full", "svd"])
@pytest.mark.parametrize("other", ["lycoris_lokr", "lycoris_loha", "lycoris_full_diff", "lycoris_dora", "kohya_oft", "lycoris_glora"])
def test_kinds_through_the_difference(base: Path, lora_file: LoraFile, tmp_path: Path, other: str, how: str) -> None:
    """As a full difference, or as a LoRA of a rank that holds it: what both do to the weights of the base."""
    both = (lora_file("kohya"), 0.5), (lora_file(other), 0.8)
    with pytest.raises(ModelFileError, match="no exact sum.*--rank N"):
        merge(tmp_path / "out.safetensors", *both)
    options = {"rank": 64} if how == "svd" else {}
    merge(tmp_path / "out.safetensors", *both, how=how, base=base, format="kohya", dtype="fp32", **options)
    merged = tmp_path / "model.safetensors"
    merge_into_model(MergeRequest({"dit": base}, {"dit": merged}, both))
    before, after = tensors_of(base), tensors_of(merged)
    for path, layer in read_adapter(tmp_path / "out.safetensors").layers.items():
        name = path.removeprefix("dit.") + ".weight"
        assert float((before[name] + delta_of(path, layer, before[name]) - after[name]).abs().max()) < 2e-5, path


def test_one_adapter_of_another_kind_at_a_strength(base: Path, lora_file: LoraFile, tmp_path: Path) -> None:
    """Kinds with alpha say it there, a full difference in its values; others need the base."""
    for name in ("lycoris_lokr", "lycoris_loha", "lycoris_full_diff"):
        merge(tmp_path / f"{name}.safetensors", (lora_file(name), 0.5))
        before, after = read_adapter(lora_file(name)), read_adapter(tmp_path / f"{name}.safetensors")
        for path, layer in before.layers.items():
            zero = torch.zeros(layer.height(), layer.in_features or 0)
            assert torch.allclose(delta_of(path, after.layers[path], zero), 0.5 * delta_of(path, layer, zero), atol=1e-6)
    with pytest.raises(ModelFileError, match="oft at strength 0.5 have no exact sum"):
        merge(tmp_path / "oft.safetensors", (lora_file("kohya_oft"), 0.5))
    with pytest.raises(ModelFileError, match=r"without the base model.*depends on the weight.*--base"):
        merge(tmp_path / "oft.safetensors", (lora_file("kohya_oft"), 0.5), how="full")


def test_metadata_is_true(make_lora: MakeLora, tmp_path: Path) -> None:
    a, b = make_lora("a", seed=1, rank=3), make_lora("b", seed=2, rank=5, layers=("img_in",))
    merge(tmp_path / "out.safetensors", (a, 0.5), (b, 1.0))
    made = metadata_of(tmp_path / "out.safetensors")
    assert (made["ss_network_dim"], made["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert made["modelspec.merged_from"] == "a.safetensors x 0.5 + b.safetensors x 1"
    assert made["modelspec.title"] == "out"
    assert made["sshs_model_hash"] not in (metadata_of(a)["sshs_model_hash"], metadata_of(b)["sshs_model_hash"])
    merge(tmp_path / "bare.safetensors", (a, 0.5), (b, 1.0), has_metadata=False)
    assert not any(key.startswith(("ss_", "modelspec")) for key in metadata_of(tmp_path / "bare.safetensors"))


def test_mistakes(make_lora: MakeLora, tmp_path: Path) -> None:
    lora = make_lora("a", seed=1)
    with pytest.raises(ConfigError, match="no adapter"):
        merge(tmp_path / "out.safetensors")
    with pytest.raises(ConfigError, match="rank 4 with exact"):
        merge(tmp_path / "out.safetensors", (lora, 1.0), rank=4)
    with pytest.raises(ConfigError, match="add --overwrite"):
        merge(lora, (lora, 1.0))
    with pytest.raises(ConfigError, match="no adapter format 'koyha'"):
        merge(tmp_path / "out.safetensors", (lora, 1.0), format="koyha")
