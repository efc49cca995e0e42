"""flux_minimal_inference: settings, LoRAs, interactive lines, and pictures of the bundled model."""

import io
from pathlib import Path

import pytest
from PIL import Image

from fluxsmith.cli.main import run
from fluxsmith.dialects.sd_scripts.drawing import Drawing, changed, drawing
from fluxsmith.dialects.sd_scripts.options import read_options
from fluxsmith.dialects.sd_scripts.scripts import split_command
from fluxsmith.errors import ConfigError

BUNDLE = Path(__file__).resolve().parents[3] / "src" / "fluxsmith" / "bundle" / "flux-shapes"
FILES = ["--ckpt_path", "f", "--clip_l", "c", "--t5xxl", "t", "--ae", "a"]
SMALL = [
    *("--ckpt_path", str(BUNDLE / "dit.safetensors"), "--clip_l", str(BUNDLE / "clip_l.safetensors")),
    *("--t5xxl", str(BUNDLE / "t5xxl.safetensors"), "--ae", str(BUNDLE / "ae.safetensors")),
    *("--width", "60", "--height", "64", "--steps", "1", "--output_dir", "out"),
]


def asked(*words: str) -> Drawing:
    script, rest, _ = split_command(["flux_minimal_inference.py", *words])
    return drawing(read_options(script, rest))


@pytest.mark.ledger("KS-48")
def test_defaults_are_those_of_the_script() -> None:
    made = asked(*FILES)
    assert made.settings == {"width": 1360, "height": 768, "steps": 50, "guidance": 3.5, "cfg": 1.0, "negative": ""}
    assert made.model == {"type": "flux1", "preset": "dev", "path": "f", "clip_l": "c", "t5xxl": "t", "ae": "a"}
    assert (made.prompt, made.seed, made.dtype, made.loras) == ("A photo of a cat", None, None, ())


@pytest.mark.ledger("KS-48")
def test_settings() -> None:
    words = ["--width", "1000", "--cfg_scale", "4", "--negative_prompt", "x", "--lora_weights", "a;0.5", "b", "--merge_lora_weights"]
    made = asked(*FILES, *words, "--apply_t5_attn_mask", "--flux_dtype", "fp16", "--t5xxl_dtype", "float32", "--clip_l_dtype", "bf16")
    assert (made.settings["width"], made.settings["cfg"], made.settings["negative"]) == (1008, 4.0, "x")
    assert (made.loras, made.is_merged, made.dtype) == ((("a", 0.5), ("b", 1.0)), True, "fp16")
    assert (made.model["mask_text"], made.model["text_dtype"]) == (True, "fp32")
    assert any("both text encoders take the type" in note for note in made.notes)


@pytest.mark.ledger("KS-48")
def test_chroma_needs_no_clip() -> None:
    assert asked("--model_type", "chroma", "--ckpt_path", "f", "--t5xxl", "t", "--ae", "a").model["type"] == "chroma"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "add --ckpt_path.*add --clip_l.*add --t5xxl.*add --ae"),
        ([*FILES, "--dtype", "int8"], "write bf16, fp16 or fp32"),
        ([*FILES, "--lora_weights", "a;strong"], r"file.safetensors;0.8"),
        ([*SMALL, "--model_type", "chroma"], "write --model_type flux"),
    ],
)
def test_mistakes(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        asked(*words)


def test_lines() -> None:
    base = asked(*FILES, "--lora_weights", "a", "b")
    made = changed(base, "a dog --w 500 --h 64 --s 4 --d 7 --g 2 --c 3 --n blurry --m 0.5,0.25")
    assert made.settings == {"width": 512, "height": 64, "steps": 4, "guidance": 2.0, "cfg": 3.0, "negative": "blurry"}
    assert (made.prompt, made.seed, made.loras) == ("a dog", 7, (("a", 0.5), ("b", 0.25)))
    assert changed(base, "--d 3").prompt == base.prompt
    for line, says in (("a --x 1", "is no option of a prompt"), ("a --w big", "is not a number"), ("a --m 1", "1 strengths for 2 LoRAs")):
        with pytest.raises(ConfigError, match=says):
            changed(base, line)


@pytest.mark.ledger("KS-48")
def test_a_picture_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["sd-scripts", "flux_minimal_inference.py", *SMALL, "--prompt", "a large red circle", "--seed", "3"]) == 0
    assert "seed 3" in capsys.readouterr().out
    (path,) = (tmp_path / "out").iterdir()
    with Image.open(path) as picture:
        assert picture.size == (64, 64)
        assert "a large red circle" in str(picture.info)


def test_interactive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("a dog --d 3\nbad --x\n\nnever"))
    assert run(["sd-scripts", "flux_minimal_inference.py", *SMALL, "--interactive"]) == 0
    said = capsys.readouterr()
    assert said.out.count("seed 3") == 1
    assert "--x is no option of a prompt" in said.err
    assert len(list((tmp_path / "out").iterdir())) == 1
