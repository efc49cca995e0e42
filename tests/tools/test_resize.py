"""Ranks are cut as sd-scripts' resize_lora counts them, strengths stay, and what is kept is the best that the rank can hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import deltas_of, metadata_of, tensors_of

from fluxsmith.adapters.formats.files import read_adapter
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.tools.inspect import inspect
from fluxsmith.tools.resize import Method, ResizeReport, ResizeRequest, count, resize

MakeLora = Callable[..., Path]
LoraFile = Callable[[str], Path]


def run(source: Path, target: Path, rank: int, **options: Any) -> ResizeReport:
    return resize(ResizeRequest(source, target, rank, **options))


@pytest.mark.parametrize(("method", "parameter", "expected"), [("ratio", 4.0, 3), ("sum", 0.9, 5), ("energy", 0.9, 3)])
def test_counts_are_those_of_sd_scripts(method: Method, parameter: float, expected: int) -> None:
    """Run with sd-scripts on a layer with these singular values: 3, 5, 3."""
    values = torch.tensor([8, 4, 2, 1, 0.5, 0.25])
    request = ResizeRequest("a", Path("b.safetensors"), 64, method, parameter)
    assert count(values, request) == expected
    assert count(values, ResizeRequest("a", Path("b.safetensors"), 2, method, parameter)) == 2  # the rank given is the limit
    assert count(torch.full((6,), 1e-9), request) == 1
    assert count(torch.tensor([1.0]), request) <= 2


@pytest.mark.parametrize("form", ["kohya", "peft", "ai_toolkit", "comfy", "diffsynth", "onetrainer"])
def test_a_smaller_rank_keeps_the_best(make_lora: MakeLora, tmp_path: Path, form: str) -> None:
    lora = make_lora("a", seed=1, rank=6, alpha=3.0, format=form)
    report = run(lora, tmp_path / "out.safetensors", 2)
    before, after = read_adapter(lora), read_adapter(tmp_path / "out.safetensors")
    for path, layer in before.layers.items():
        made = after.layers[path]
        assert made.rank == 2
        for old, new in zip(layer.parts, made.parts, strict=True):
            assert new.scale == pytest.approx(old.scale)
            exact, cut = old.scale * old.up @ old.down, new.scale * new.up @ new.down
            best = float(torch.linalg.svdvals(exact)[2:].square().sum())
            assert float((exact - cut).square().sum()) == pytest.approx(best, rel=1e-3)
    for layer, old in zip(report.layers, [part for whole in before.layers.values() for part in whole.parts], strict=True):
        values = torch.linalg.svdvals(old.up @ old.down)[:6]
        assert layer.norm == pytest.approx(float(values[:2].norm() / values.norm()), rel=1e-3)
        assert layer.sum == pytest.approx(float(values[:2].sum() / values.sum()), rel=1e-3)
    assert 0 < report.kept[1] <= report.kept[0] < 1


def test_ranks_do_not_grow(make_lora: MakeLora, tmp_path: Path) -> None:
    lora = make_lora("a", seed=1, rank=3, alpha=2.0)
    report = run(lora, tmp_path / "out.safetensors", 16)
    assert {layer.rank for layer in report.layers} == {3}
    a, b = deltas_of(lora), deltas_of(tmp_path / "out.safetensors")
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-6
    assert report.kept == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(("method", "parameter"), [("ratio", 2.0), ("energy", 0.8), ("sum", 0.6)])
def test_rank_by_method(make_lora: MakeLora, tmp_path: Path, method: Method, parameter: float) -> None:
    lora = make_lora("a", seed=1, rank=12, alpha=12.0)
    report = run(lora, tmp_path / "out.safetensors", 64, method=method, parameter=parameter)
    for layer, (_, delta) in zip(report.layers, deltas_of(lora).items(), strict=True):
        values = torch.linalg.svdvals(delta)[:12]
        expected = {
            "ratio": int((values > values[0] / parameter).sum()) + 1,
            "energy": int((values.square().cumsum(0) < parameter**2 * values.square().sum()).sum()) + 2,
            "sum": int((values.cumsum(0) < parameter * values.sum()).sum()) + 2,
        }[method]
        assert layer.rank == min(expected, 12)
    made = metadata_of(tmp_path / "out.safetensors")
    assert (made["ss_network_dim"], made["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert made["ss_training_comment"].startswith(f"resized to {method} {parameter:g}, rank at most 64")


def test_metadata_types_and_split_layers(lora_file: LoraFile, make_lora: MakeLora, tmp_path: Path) -> None:
    lora = make_lora("a", seed=1, rank=4, alpha=2.0, dtype=torch.bfloat16)
    run(lora, tmp_path / "out.safetensors", 2)
    made = metadata_of(tmp_path / "out.safetensors")
    assert (made["ss_network_dim"], made["ss_network_alpha"], made["ss_training_comment"]) == ("2", "1.0", "resized to rank 2")
    assert made["sshs_model_hash"] != metadata_of(lora)["sshs_model_hash"]
    assert {value.dtype for name, value in tensors_of(tmp_path / "out.safetensors").items() if "alpha" not in name} == {torch.bfloat16}
    run(lora, tmp_path / "fp16.safetensors", 2, dtype="fp16")
    assert {value.dtype for name, value in tensors_of(tmp_path / "fp16.safetensors").items() if "alpha" not in name} == {torch.float16}
    report = run(lora_file("diffusers_peft"), tmp_path / "split.safetensors", 1)
    assert {layer.rank for layer in report.layers} == {1}
    assert inspect(tmp_path / "split.safetensors").format == "peft"


def test_other_kinds_are_refused(lora_file: LoraFile, tmp_path: Path) -> None:
    for name, says in (
        ("lycoris_lokr", "is lokr"),
        ("lycoris_dora", "is dora, .*norms belong"),
        ("kohya_oft", "is oft"),
        ("lycoris_full_diff", "is full"),
    ):
        with pytest.raises(ModelFileError, match=says):
            run(lora_file(name), tmp_path / "out.safetensors", 2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, "below 1"),
        ({"rank": 4, "method": "ratio"}, "come together"),
        ({"rank": 4, "method": "ratio", "parameter": 1.0}, "give 2 or more"),
        ({"rank": 4, "method": "sum", "parameter": 1.5}, "no share"),
        ({"rank": 4, "dtype": "int8"}, "no type"),
    ],
)
def test_mistakes(make_lora: MakeLora, tmp_path: Path, options: dict[str, Any], says: str) -> None:
    lora = make_lora("a", seed=1)
    with pytest.raises(ConfigError, match=says):
        run(lora, tmp_path / "out.safetensors", **options)
    with pytest.raises(ConfigError, match="--overwrite"):
        run(lora, lora, 2)
