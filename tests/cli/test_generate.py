"""`fluxsmith generate` as a user types it: options, exit codes, what is printed and written."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from header_files import header_only
from PIL import Image

from fluxsmith.cli.generate import _model_section, _parts
from fluxsmith.cli.main import run
from fluxsmith.errors import ConfigError

Generate = Callable[..., int]


@pytest.fixture
def generate(tiny_section: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generate:
    """Runs the verb on the tiny model in an empty folder."""
    monkeypatch.chdir(tmp_path)
    files = [f"--{key.replace('_', '-')}={tiny_section[key]}" for key in ("clip_l", "t5xxl", "ae")]

    def call(*arguments: str, model: Sequence[str] = (f"--model={tiny_section['path']}", "--preset=flux-shapes", *files)) -> int:
        return run(["generate", *model, "--device", "cpu", *arguments])

    return call


SMALL = ("--width", "32", "--height", "32", "--steps", "1")


def test_one_picture(generate: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--prompt", "a red circle", *SMALL, "--seed", "3") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("out.png  ")
    assert shown.endswith(" s  seed 3\n")
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (32, 32)
        assert "Seed: 3" in image.info["parameters"]


def test_size_and_steps_are_the_models_own(generate: Generate, tmp_path: Path) -> None:
    assert generate("--prompt", "a") == 0
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (64, 64)
        assert "Steps: 12" in image.info["parameters"]


def test_prompts_and_seeds_make_a_grid(generate: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("-p", "a", "-p", "b", "--seed", "1", "--seed", "2", *SMALL, "-o", "many") == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == [
        "000_s1.png", "001_s2.png", "002_s1.png", "003_s2.png", "grid.png",
    ]  # fmt: skip


def test_json_is_one_record_a_picture(generate: Generate, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("-p", "a", *SMALL, "--guidance", "1.5", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["path"], record["guidance"], record["width"], record["seed"]) == ("out.png", 1.5, 32, 0)
    assert record["seconds"] > 0


def test_the_model_of_a_run_file(generate: Generate, tiny_run_file: Callable[..., Path], tmp_path: Path) -> None:
    file = tiny_run_file(tmp_path / "cats", {"train.steps": 2})
    assert generate("-p", "a red circle", *SMALL, model=[str(file)]) == 0
    base = (tmp_path / "out.png").read_bytes()
    assert run(["train", str(file), "--quiet"]) == 0
    lora = str(tmp_path / "cats" / "weights" / "cats.safetensors")
    assert generate("-p", "a red circle", *SMALL, "--lora", f"{lora}:2.0", model=[str(file)]) == 0
    with Image.open(tmp_path / "out.png") as image:
        assert json.loads(image.info["fluxsmith"])["loras"] == [[lora, 2.0]]
    assert (tmp_path / "out.png").read_bytes() != base


@pytest.mark.ledger("DS-04")
def test_image_to_image(generate: Generate, tmp_path: Path) -> None:
    Image.new("RGB", (96, 48), (200, 30, 30)).save(tmp_path / "start.png")
    assert generate("-p", "a", "--steps", "4", "--image", "start.png", "--strength", "0.5") == 0
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (96, 48)
        assert "Denoising strength: 0.5" in image.info["parameters"]


@pytest.mark.ledger("DS-05")
def test_tiles(generate: Generate, tmp_path: Path) -> None:
    assert generate("-p", "a", "--steps", "1", "--width", "96", "--tile", "64") == 0
    with Image.open(tmp_path / "out.png") as image:
        assert json.loads(image.info["fluxsmith"])["tile"] == 64


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "Missing option '--prompt'"),
        (["-p", "a", "--width", "33"], 2, "use 32"),
        (["-p", "a", "--steps", "0"], 2, "steps = 0"),
        (["-p", "a", "--steps", "many"], 2, "--steps"),
        (["-p", "a", "--shift", "big"], 2, "flux, none or a number"),
        (["-p", "a", "--sampler", "ddim"], 2, "euler, heun"),
        (["-p", "a", "--strength", "0.5"], 2, "strength without a starting picture"),
        (["-p", "a", "--negative", "b"], 2, "no effect while cfg is 1"),
        (["-p", "a", "--device", "tpu"], 2, "--device"),
        (["-p", "a", "-o", "a.jpg"], 2, "use a.png"),
        (["-p", "a", "--seed", "1", "--seed", "2", "-o", "a.png"], 2, "give a folder with --out"),
        (["-p", "a", "--lora", "a.safetensors:nan"], 2, "write a.safetensors:1.0"),
        (["-p", "a", "--image", "none.png"], 3, "none.png"),
        (["-p", "a", "--lora", "none.safetensors"], 4, "none.safetensors"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_exit_codes(
    generate: Generate, tmp_path: Path, arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(*arguments) == code
    shown = capsys.readouterr().err
    assert words in shown
    assert "Fix: " in shown
    assert "Traceback" not in shown
    assert list(tmp_path.glob("*.png")) == []


def test_all_wrong_settings_are_listed(generate: Generate, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("-p", "a", "--width", "33", "--height", "32", "--steps", "0", "--cfg", "-1", "--seed", "-4") == 2
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_models_that_are_not_there(generate: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, code, words in (
        ([], 2, "give a run file, or --model"),
        (["--model=none.safetensors"], 4, "none.safetensors"),
        (["none.toml"], 2, "none.toml"),
        (["none.toml", "--model=x"], 2, "drop one of them"),
    ):
        assert generate("-p", "a", model=model) == code
        assert words in capsys.readouterr().err


def test_a_wrong_file_in_a_role_is_named(generate: Generate, tiny_section: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    swapped = [f"--model={tiny_section['path']}", f"--ae={tiny_section['clip_l']}", f"--clip-l={tiny_section['ae']}"]
    assert generate("-p", "a", model=[*swapped, f"--t5xxl={tiny_section['t5xxl']}", "--preset=flux-shapes"]) == 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert any("CLIP" in line and "autoencoder" in line for line in lines)


def test_a_lora_with_a_colon_in_its_name(generate: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FILE:WEIGHT is split at the last colon, and only before a number."""
    assert generate("-p", "a", "--lora", "C:\\loras\\cat.safetensors") == 4
    assert "C:\\loras\\cat.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        ("flux1-dev", ("flux1", "dev")),
        ("flux1-schnell", ("flux1", "schnell")),
        ("flux1-fill-dev", ("flux1", "fill")),
        ("flux1-canny-dev", ("flux1", "canny")),
        ("flex2-preview", ("flux1", "flex2")),
        ("step1x-edit", ("step1x", "edit")),
        ("nexus-gen-v2-edit-decoder", ("nexus_gen", "edit")),
        ("nexus-gen-v2-generation-decoder", ("nexus_gen", "generation")),
        ("chroma", ("chroma", "hd")),
    ],
)
def test_a_model_file_is_told_by_its_header(manifest: str, expected: tuple[str, str], manifests_root: Path, tmp_path: Path) -> None:
    tensors = json.loads((manifests_root / f"{manifest}.json").read_text())["tensors"]
    path = header_only(tmp_path / "model.safetensors", tensors)
    section = _model_section(None, str(path), {"preset": "", "clip_l": "", **_parts(["ae=ae.safetensors"])})
    assert (section.type, section.model_dump()["preset"]) == expected


@pytest.mark.parametrize("text", ["qwen", "=x", "qwen="])
def test_a_part_has_a_name_and_a_path(text: str) -> None:
    with pytest.raises(ConfigError, match="--part"):
        _parts([text])
