"""Chroma trained and sampled through the same code: LoRA and full fine-tune, true guidance with a negative prompt."""

import json
from pathlib import Path

import pytest
import tiny_run
import torch
from ran import Go

from fluxsmith.adapters.formats.files import read_adapter
from fluxsmith.cli.main import run
from fluxsmith.config.load import load_config
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.generate.request import Request
from fluxsmith.io.safetensors import read_header

SAMPLE = {"prompt": "a red circle", "negative": "blue", "width": 32, "height": 32, "steps": 2}


@pytest.mark.ledger("KS-02")
@pytest.mark.ledger("KS-44")
def test_a_lora_for_chroma(go: Go, tiny_model: Path) -> None:
    ran = go({"model": tiny_run.chroma_model(tiny_model), "adapter": {"type": "lora", "rank": 2}, "sample": [SAMPLE]})
    assert ran.error is None
    assert ran.warnings == ""
    path = ran.folder / "weights" / "w.safetensors"
    metadata = read_header(path).metadata
    assert metadata["ss_base_model_version"] == "chroma"
    assert metadata["modelspec.architecture"] == "chroma/lora"
    assert metadata["modelspec.implementation"].endswith("Chroma")
    layers = read_adapter(path).layers
    assert "dit.double_blocks.0.img_attn.qkv" in layers
    assert not any("mod" in name for name in layers)
    assert len(list((ran.folder / "samples").iterdir())) == 2


@pytest.mark.ledger("KS-44")
def test_a_full_fine_tune_trains_the_modulation_network_too(go: Go, tiny_model: Path) -> None:
    ran = go({"model": tiny_run.chroma_model(tiny_model)})
    assert ran.error is None
    before = tiny_run.random_chroma().state_dict()
    after = ran.weights
    moved = [name for name, value in before.items() if not torch.equal(value, after[f"dit.{name}"])]
    assert any(name.startswith("distilled_guidance_layer.") for name in moved)
    assert any(name.startswith("double_blocks.") for name in moved)
    assert read_header(ran.folder / "weights" / "w.safetensors").metadata["modelspec.architecture"] == "chroma"


@pytest.mark.ledger("KS-03")
@pytest.mark.ledger("KS-44")
def test_true_guidance_with_a_negative_prompt(tiny_model: Path) -> None:
    pipeline = Pipeline.load(tiny_run.chroma_model(tiny_model))
    assert pipeline.models.clip_l is None
    plain = Request("a red circle", width=32, height=32, steps=2)
    one, other = (pipeline.latents(pipeline.completed(Request(**{**plain.__dict__, **change}))) for change in ({}, {"cfg": 4.0}))
    third = pipeline.latents(pipeline.completed(Request(**{**plain.__dict__, "cfg": 4.0, "negative": "a blue square"})))
    assert not torch.allclose(one, other)
    assert not torch.allclose(other, third)


def test_its_defaults_are_its_own(tiny_model: Path, tmp_path: Path) -> None:
    plain = {"model": tiny_run.chroma_model(tiny_model), "train": {"steps": 1}, "sample": [{"prompt": "x"}], "run": {"dir": str(tmp_path)}}
    config = load_config({**plain, "data": [{"type": "folder", "path": str(tiny_model / "pictures")}]}).config
    assert (config.noise.guidance, config.noise.sampling) == (0.0, "sigmoid")
    assert (config.sample[0].guidance, config.sample[0].cfg) == (0.0, 4.0)


def test_generate_recognises_chroma(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The transformer's header tells; guidance and true guidance are Chroma's own."""
    files, out = tiny_run.chroma_model(tiny_model), tmp_path / "a.png"
    options = ["--model", files["path"], "--t5xxl", files["t5xxl"], "--ae", files["ae"], "--width", "32", "--height", "32", "--steps", "1"]
    asked = ["generate", *options, "--prompt", "a red circle", "--out", str(out), "--json"]
    assert run(asked) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["cfg"], record["guidance"]) == (4.0, 0.0)
    assert out.is_file()
    assert run([*asked, "--clip-l", files["t5xxl"]]) == 2
    assert "which has no CLIP" in capsys.readouterr().err
