"""Extraction gives back what was added, from any layout and type, and says what it could not hold."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lora_files import deltas_of, diffusers_folder, merged_by_hand, metadata_of, tensors_of

from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.io.safetensors import open_weights, save_weights
from fluxsmith.tools.extract import ExtractReport, ExtractRequest, extract
from fluxsmith.tools.low_rank import Ranks

LoraFile = Callable[[str], Path]
MakeLora = Callable[..., Path]


def run(original: Path, tuned: Path, target: Path, ranks: Ranks | None = None, **options: object) -> ExtractReport:
    settings = {"dtype": "fp32", **options}
    return extract(ExtractRequest({"dit": (original, tuned)}, target, ranks or Ranks(number=3), **settings))  # type: ignore[arg-type]


@pytest.mark.ledger("KS-45")
@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_full_rank_gives_the_lora_back(base: Path, lora_file: LoraFile, tmp_path: Path, form: str) -> None:
    tuned = merged_by_hand(base, tmp_path / "tuned.safetensors", {lora_file("kohya"): 1.0})
    report = run(base, tuned, tmp_path / "out.safetensors", format=form)
    expected, made = deltas_of(lora_file("kohya")), deltas_of(tmp_path / "out.safetensors")
    assert expected.keys() == made.keys()
    assert max(float((expected[path] - made[path]).abs().max()) for path in expected) < 1e-4
    assert report.residual < 1e-6
    assert all(layer.rank == 3 for layer in report.layers)
    assert report.left_out == ()


def test_residual_is_the_share_that_is_lost(base: Path, make_lora: MakeLora, tmp_path: Path) -> None:
    lora = make_lora("a", seed=1, rank=6, alpha=6.0)
    tuned = merged_by_hand(base, tmp_path / "tuned.safetensors", {lora: 1.0})
    report = run(base, tuned, tmp_path / "out.safetensors", Ranks(number=2))
    expected, made = deltas_of(lora), deltas_of(tmp_path / "out.safetensors")
    lost = {path: float((expected[path] - made[path]).square().sum()) for path in expected}
    for layer in report.layers:
        energy = float(expected[layer.path].square().sum())
        values = torch.linalg.svdvals(expected[layer.path])
        assert layer.residual == pytest.approx(float(values[2:].square().sum()) / energy, rel=1e-3)  # no rank-2 matrix is nearer
        assert layer.residual == pytest.approx(lost[layer.path] / energy, rel=1e-3)
        assert layer.norm == pytest.approx(energy**0.5, rel=1e-4)
    assert report.residual == pytest.approx(sum(lost.values()) / sum(float(d.square().sum()) for d in expected.values()), rel=1e-3)


def test_rank_by_energy_and_ratio(base: Path, make_lora: MakeLora, tmp_path: Path) -> None:
    lora = make_lora("a", seed=1, rank=8, alpha=8.0)
    tuned = merged_by_hand(base, tmp_path / "tuned.safetensors", {lora: 1.0})
    values = {path: torch.linalg.svdvals(delta) for path, delta in deltas_of(lora).items()}
    by_energy = run(base, tuned, tmp_path / "energy.safetensors", Ranks(energy=0.9))
    for layer in by_energy.layers:
        squares = values[layer.path].square()
        assert float(squares[: layer.rank].sum() / squares.sum()) >= 0.9 - 1e-5
        assert float(squares[: layer.rank - 1].sum() / squares.sum()) < 0.9
        assert layer.residual <= 0.1 + 1e-5
    by_ratio = run(base, tuned, tmp_path / "ratio.safetensors", Ranks(ratio=1.5))
    for layer in by_ratio.layers:
        assert layer.rank == int((values[layer.path] > values[layer.path][0] / 1.5).sum())
    capped = run(base, tuned, tmp_path / "capped.safetensors", Ranks(energy=0.999, limit=2))
    assert {layer.rank for layer in capped.layers} == {2}
    assert json.loads(json.dumps(capped.as_record()))["layers"][0]["rank"] == 2


@pytest.mark.ledger("KS-45")
def test_bf16_fp8_scaled_and_prefixed_files(base: Path, lora_file: LoraFile, tmp_path: Path, fixtures_root: Path) -> None:
    """The LoRA is found again within the rounding of the stored types."""
    tensors = tensors_of(base)
    tuned = tensors_of(merged_by_hand(base, tmp_path / "fp32.safetensors", {lora_file("kohya"): 20.0}))
    expected, ae = deltas_of(lora_file("kohya")), tensors_of(fixtures_root / "ae-tiny/weights.safetensors")
    for name, size in (("bf16", 2e-2), ("prefixed", 2e-2), ("fp8", 0.5), ("scaled", 0.5)):
        pair = []
        for which, values in (("original", tensors), ("tuned", tuned)):
            path = tmp_path / f"{name}-{which}.safetensors"
            save_weights(path, stored(values, name, ae), {})
            pair.append(path)
        run(*pair, tmp_path / f"{name}.safetensors", Ranks(number=3))
        mixed = run(pair[0], tmp_path / "fp32.safetensors", tmp_path / f"mixed-{name}.safetensors")
        assert any("its rounding is part of the difference" in note for note in mixed.notes) == (name in ("fp8", "scaled"))
        made = deltas_of(tmp_path / f"{name}.safetensors")
        assert made.keys() == expected.keys()
        for path, delta in expected.items():
            assert float((made[path] / 20 - delta).norm() / delta.norm()) < size, (name, path)


def stored(values: dict[str, torch.Tensor], form: str, ae: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if form == "bf16":
        return {key: value.bfloat16() for key, value in values.items()}
    if form == "prefixed":
        return {f"model.diffusion_model.{key}": value.bfloat16() for key, value in values.items()} | {
            f"vae.{key}": value for key, value in ae.items()
        }
    if form == "fp8":
        return {key: value.to(torch.float8_e4m3fn) if value.dim() == 2 else value for key, value in values.items()}
    made: dict[str, torch.Tensor] = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for key, value in values.items():
        if value.dim() != 2:
            made[key] = value.bfloat16()
            continue
        scale = value.abs().max() / 448
        made[key] = (value / scale).to(torch.float8_e4m3fn)
        made[key.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
    return made


@pytest.mark.ledger("KS-45")
def test_diffusers_folders(base: Path, lora_file: LoraFile, tmp_path: Path) -> None:
    tuned = merged_by_hand(base, tmp_path / "tuned.safetensors", {lora_file("kohya"): 1.0})
    run(diffusers_folder(base, tmp_path / "a"), diffusers_folder(tuned, tmp_path / "b"), tmp_path / "out.safetensors")
    expected, made = deltas_of(lora_file("kohya")), deltas_of(tmp_path / "out.safetensors")
    assert max(float((expected[path] - made[path]).abs().max()) for path in expected) < 1e-4
    mixed = run(base, tmp_path / "b", tmp_path / "mixed.safetensors")
    assert mixed.residual < 1e-6


@pytest.mark.ledger("KS-45")
def test_text_encoders(fixtures_root: Path, tmp_path: Path) -> None:
    lora, pairs = fixtures_root / "text-encoder-lora-tiny/kohya.safetensors", {}
    for role, name in (("clip_l", "clip_l-tiny"), ("t5xxl", "t5-tiny")):
        original = fixtures_root / name / "weights.safetensors"
        pairs[role] = (original, merged_by_hand(original, tmp_path / f"{role}.safetensors", {lora: 1.0}, role=role))
    extract(ExtractRequest(pairs, tmp_path / "out.safetensors", Ranks(number=3), dtype="fp32"))
    expected, made = deltas_of(lora), deltas_of(tmp_path / "out.safetensors")
    assert made.keys() == expected.keys()
    assert max(float((expected[path] - made[path]).abs().max()) for path in expected) < 1e-4


def test_layers_and_smallest_difference(base: Path, make_lora: MakeLora, tmp_path: Path) -> None:
    big, small = (
        make_lora("big", seed=1, layers=("single_blocks.0.linear2",)),
        make_lora("small", seed=2, layers=("img_in", "single_blocks.1.linear2")),
    )
    tuned = merged_by_hand(base, tmp_path / "tuned.safetensors", {big: 1.0, small: 0.01})
    size = float(deltas_of(small)["dit.single_blocks.1.linear2"].abs().max()) * 0.01
    report = run(base, tuned, tmp_path / "a.safetensors", min_difference=size * 1.01)
    assert [layer.path for layer in report.layers] == ["dit.single_blocks.0.linear2"]
    assert "dit.single_blocks.1.linear2" in report.same
    report = run(base, tuned, tmp_path / "b.safetensors", layers=("single_blocks.1", "dit.img_in"))
    assert {layer.path for layer in report.layers} == {"dit.single_blocks.1.linear2", "dit.img_in"}
    assert [name for name, _ in report.left_out] == ["dit.single_blocks.0.linear2.weight"]
    assert report.left_out[0][1] == pytest.approx(float(deltas_of(big)["dit.single_blocks.0.linear2"].norm()), rel=1e-4)
    with pytest.raises(ModelFileError, match="do not differ"):
        run(base, tuned, tmp_path / "c.safetensors", layers=("attention",))


def test_what_no_lora_holds_is_reported(base: Path, make_lora: MakeLora, tmp_path: Path) -> None:
    tuned = merged_by_hand(base, tmp_path / "tuned.safetensors", {make_lora("a", seed=1): 1.0})
    tensors = tensors_of(tuned)
    tensors["double_blocks.0.img_attn.qkv.bias"][0] += 3.0
    save_weights(tuned, tensors, {})
    assert run(base, tuned, tmp_path / "out.safetensors").left_out == (("dit.double_blocks.0.img_attn.qkv.bias", 3.0),)


@pytest.mark.ledger("KS-45")
def test_clamping_is_that_of_sd_scripts(base: Path, make_lora: MakeLora, tmp_path: Path) -> None:
    """Both factors are cut off at the quantile of all their signed values."""
    lora = make_lora("a", seed=1, layers=("single_blocks.0.linear2",))
    tuned = merged_by_hand(base, tmp_path / "tuned.safetensors", {lora: 1.0})
    delta = deltas_of(lora)["dit.single_blocks.0.linear2"]
    report = run(base, tuned, tmp_path / "out.safetensors", clamp_quantile=0.99)
    with open_weights(tmp_path / "out.safetensors") as weights:
        up = weights.tensor("lora_unet_single_blocks_0_linear2.lora_up.weight")
        down = weights.tensor("lora_unet_single_blocks_0_linear2.lora_down.weight")
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    limit = torch.quantile(torch.cat([(left[:, :3] * values[:3]).flatten(), right[:3].flatten()]), 0.99)
    largest = float(torch.cat([up.flatten(), down.flatten()]).abs().max())
    assert largest == pytest.approx(float(limit), rel=0.05)  # the signs of singular vectors are free
    assert report.residual > 1e-4
    assert report.residual == pytest.approx(float((delta - up @ down).square().sum() / delta.square().sum()), rel=1e-3)


def test_same_seed_same_bytes_and_metadata(base: Path, lora_file: LoraFile, tmp_path: Path) -> None:
    tuned = merged_by_hand(base, tmp_path / "tuned.safetensors", {lora_file("kohya"): 1.0})
    for name in ("a", "b"):
        run(base, tuned, tmp_path / f"{name}.safetensors", dtype="bf16")
    a, b = metadata_of(tmp_path / "a.safetensors"), metadata_of(tmp_path / "b.safetensors")
    assert a["sshs_model_hash"] == b["sshs_model_hash"]
    expected = {
        "ss_v2": "False", "ss_base_model_version": "flux1", "ss_network_module": "networks.lora_flux", "ss_network_dim": "3",
        "ss_network_alpha": "3.0", "ss_network_args": "{}", "modelspec.architecture": "flux-1-dev/lora", "modelspec.title": "a",
    }  # fmt: skip
    assert {key: a[key] for key in expected} == expected
    run(base, tuned, tmp_path / "c.safetensors", has_metadata=False)
    assert not any(key.startswith(("ss_", "modelspec")) for key in metadata_of(tmp_path / "c.safetensors"))


def test_dry_run_writes_nothing(base: Path, lora_file: LoraFile, tmp_path: Path) -> None:
    tuned = merged_by_hand(base, tmp_path / "tuned.safetensors", {lora_file("kohya"): 1.0})
    report = run(base, tuned, tmp_path / "out.safetensors", is_dry_run=True)
    assert len(report.layers) == 29
    assert not (tmp_path / "out.safetensors").exists()


def test_mistakes(base: Path, fixtures_root: Path, tmp_path: Path) -> None:
    small = fixtures_root / "flux-dev-small/weights.safetensors"
    with pytest.raises(ModelFileError, match="built differently.*and"):
        run(base, small, tmp_path / "out.safetensors")
    with pytest.raises(ModelFileError, match="do not differ"):
        run(base, base, tmp_path / "out.safetensors")
    with pytest.raises(ModelFileError, match="this is an autoencoder"):
        run(base, fixtures_root / "ae-tiny/weights.safetensors", tmp_path / "out.safetensors")
    for ranks in (Ranks(), Ranks(number=3, energy=0.9), Ranks(number=0), Ranks(energy=2.0), Ranks(ratio=1.0)):
        with pytest.raises(ConfigError):
            run(base, base, tmp_path / "out.safetensors", ranks)
    with pytest.raises(ConfigError, match="no layer is chosen"):
        run(base, base, tmp_path / "out.safetensors", layers=("double_block_9",))
    with pytest.raises(ConfigError, match="there is no adapter format"):
        run(base, base, tmp_path / "out.safetensors", format="kohia")
    (tmp_path / "out.safetensors").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="add --overwrite"):
        run(base, base, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == b"mine"
    with pytest.raises(ConfigError, match=r"write to .*out.safetensors"):
        run(base, base, tmp_path / "out.ckpt")
