"""The adapter tools behind their names in sd-scripts: what they write, and where they keep the promise that sd-scripts breaks."""

from pathlib import Path

import pytest
import torch
from lora_files import deltas_of, merged_by_hand, metadata_of, tensors_of, write_lora

from fluxsmith.cli.main import run
from fluxsmith.tools.inspect import inspect


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bare file names, at which sd-scripts' merge fails."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def base(fixtures_root: Path) -> Path:
    return fixtures_root / "flux-dev-tiny/weights.safetensors"


@pytest.fixture
def files(base: Path) -> tuple[Path, Path]:
    return write_lora(Path("a.safetensors"), base, seed=1, rank=3, alpha=2.0), write_lora(
        Path("b.safetensors"), base, seed=2, rank=2, alpha=4.0
    )


def call(line: str) -> int:
    return run(["sd-scripts", *line.split()])


def farthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.ledger("KS-45")
def test_extract(base: Path, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    merged_by_hand(base, Path("tuned.safetensors"), {files[0]: 1.0})
    words = f"networks/flux_extract_lora.py --model_org {base} --model_tuned tuned.safetensors --save_to out.safetensors --dim 3"
    assert call(f"{words} --clamp_quantile 1 --mem_eff_safe_open") == 0
    assert "4 layers of rank 3" in capsys.readouterr().out
    assert farthest(deltas_of(Path("out.safetensors")), deltas_of(files[0])) < 1e-4
    made = metadata_of(Path("out.safetensors"))
    assert (made["ss_network_module"], made["ss_network_dim"], made["modelspec.architecture"]) == (
        "networks.lora_flux",
        "3",
        "flux-1-dev/lora",
    )
    assert {value.dtype for value in tensors_of(Path("out.safetensors")).values()} == {torch.float32}
    assert call(f"{words} --save_precision bf16 --no_metadata") == 0  # clamped at 0.99, written over
    assert "modelspec.title" not in metadata_of(Path("out.safetensors"))
    assert farthest(deltas_of(Path("out.safetensors")), deltas_of(files[0])) > 1e-3


@pytest.mark.ledger("KS-47")
def test_merge_into_models(base: Path, files: tuple[Path, Path], fixtures_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"networks/flux_merge_lora.py --flux_model {base} --save_to out.safetensors --models a.safetensors b.safetensors --ratios 0.5 2"
    assert call(f"{words} --precision bf16 --shuffle") == 0
    hand = merged_by_hand(base, Path("hand.safetensors"), {files[0]: 0.5, files[1]: 2.0})
    assert farthest(tensors_of(Path("out.safetensors")), tensors_of(hand)) < 1e-6
    assert "the order of ranks changes nothing" in capsys.readouterr().err
    assert call(f"{words} --save_precision fp8_e4m3fn") == 0
    assert tensors_of(Path("out.safetensors"))["img_in.weight"].dtype == torch.float8_e4m3fn
    text, clip = fixtures_root / "text-encoder-lora-tiny/kohya.safetensors", fixtures_root / "clip_l-tiny/weights.safetensors"
    line = f"flux_merge_lora --clip_l {clip} --clip_l_save_to clip.safetensors --models {text} --ratios 0.5"
    assert call(line) == 0
    hand = merged_by_hand(clip, Path("hand-clip.safetensors"), {text: 0.5}, role="clip_l")
    made, expected = tensors_of(Path("clip.safetensors")), tensors_of(hand)
    assert max(float((made[name] - expected[name]).abs().max()) for name in made) < 1e-6
    assert "21 layers have no place in these models" in capsys.readouterr().out  # T5's


@pytest.mark.ledger("KS-47")
def test_merge_loras(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """sd-scripts squares ratios and adds cross terms; --concat divides by the number of ranks."""
    words = "flux_merge_lora --save_to out.safetensors --models a.safetensors b.safetensors --ratios 0.5 0.25"
    a, b = deltas_of(files[0]), deltas_of(files[1])
    expected = {name: 0.5 * a[name] + 0.25 * b[name] for name in a}
    assert call(f"{words} --concat") == 0
    assert farthest(deltas_of(Path("out.safetensors")), expected) < 1e-6
    assert metadata_of(Path("out.safetensors"))["ss_network_dim"] == "5"
    assert call(words) == 0
    assert inspect("out.safetensors").ranks["single"] == {3: 1}
    assert "--concat keeps all" in capsys.readouterr().out
    for name, delta in deltas_of(Path("out.safetensors")).items():
        best = torch.linalg.svdvals(expected[name])[3:].square().sum()
        assert float((delta - expected[name]).square().sum()) == pytest.approx(float(best), rel=1e-3)
    assert call("flux_merge_lora --save_to one.safetensors --models a.safetensors --ratios 0.5") == 0
    assert farthest(deltas_of(Path("one.safetensors")), {name: 0.5 * delta for name, delta in a.items()}) < 1e-5


@pytest.mark.ledger("KS-46")
def test_convert(files: tuple[Path, Path], fixtures_root: Path) -> None:
    """The text encoders, which sd-scripts drops, go along."""
    text = fixtures_root / "text-encoder-lora-tiny/kohya.safetensors"
    for source in (files[1], text):
        assert (
            call(f"networks/convert_flux_lora.py --src sd-scripts --dst ai-toolkit --src_path {source} --dst_path there.safetensors") == 0
        )
        assert inspect("there.safetensors").format == "peft"
        assert "lora_adapter_metadata" not in metadata_of(Path("there.safetensors"))
        assert call("convert_flux_lora --src_path there.safetensors --dst_path back.safetensors") == 0
        assert farthest(deltas_of(Path("back.safetensors")), deltas_of(source)) < 1e-6
    assert call("convert_flux_lora --src_path a.safetensors --dst_path back.safetensors") == 2  # a is in sd-scripts' names


def test_resize(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("networks/resize_lora.py --model a.safetensors --save_to out.safetensors --new_rank 2 --verbose") == 0
    out = capsys.readouterr().out
    assert out.count("rank 3 -> 2, sum(S) retained") == 4
    assert metadata_of(Path("out.safetensors"))["ss_network_dim"] == "2"
    line = "resize_lora --model a.safetensors --save_to out.safetensors --new_rank 8 --dynamic_method sv_fro"
    assert call(f"{line} --dynamic_param 0.9 --save_precision fp16") == 0
    assert metadata_of(Path("out.safetensors"))["ss_network_dim"] == "Dynamic"
    assert tensors_of(Path("out.safetensors"))["lora_unet_single_blocks_2_linear1.lora_up.weight"].dtype == torch.float16


def test_check(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("networks/check_lora_weights.py a.safetensors") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    value = tensors_of(files[0])["lora_unet_single_blocks_2_linear1.lora_up.weight"].abs()
    expected = f"lora_unet_single_blocks_2_linear1.lora_up.weight,{list(value.shape)},{float(value.mean()):.6g},{float(value.min()):.6g}"
    assert expected in lines
    assert call("check_lora_weights a.safetensors -s") == 0
    assert len(capsys.readouterr().out.splitlines()) == 12
