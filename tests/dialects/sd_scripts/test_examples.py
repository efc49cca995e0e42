"""The commands that users have: each lowers, and each trains two steps on the bundled model."""

import shlex
import shutil
from pathlib import Path

import pytest
from tiny_run import write_pictures

from fluxsmith.cli.main import run
from fluxsmith.config.dump import to_toml
from fluxsmith.config.load import load_config
from fluxsmith.dialects.sd_scripts.lower import lower
from fluxsmith.io.safetensors import open_weights

EXAMPLES = Path(__file__).parent / "examples"
BUNDLE = Path(__file__).resolve().parents[3] / "src" / "fluxsmith" / "bundle" / "flux-shapes"
SMALL = {"flux1-dev": "dit", "t5xxl_fp16": "t5xxl"}
DATA = """[general]
caption_extension = ".txt"
enable_bucket = true
bucket_reso_steps = 16
min_bucket_reso = 16

[[datasets]]
resolution = 32
batch_size = 2

  [[datasets.subsets]]
  image_dir = "images"
"""
REFUSED = {"--network_args train_t5xxl=True --text_encoder_lr 1e-5": "exclude each other"}  # lora.args caches the text encoders' outputs


def words(name: str) -> list[str]:
    return (EXAMPLES / name).read_text().split()


def variations() -> list[str]:
    lines = (EXAMPLES / "variations.args").read_text().splitlines()
    return ["", *[line for line in lines if line and not line.startswith("#")]]


def split(line: str) -> list[str]:
    """As a shell does with quotes around the patterns."""
    return shlex.split(line.replace("\\", "\\\\"))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder as the commands expect it: MODELS, pictures, the dataset file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODELS").mkdir()
    for path in BUNDLE.iterdir():
        (tmp_path / "MODELS" / path.name).symlink_to(path)
    write_pictures(tmp_path / "images", 5)
    write_pictures(tmp_path / "held_out", 2, seed=1)
    for name in ("chroma_prompts.txt", "multi_resolution.toml"):
        shutil.copy(EXAMPLES / name, tmp_path / name)
    (tmp_path / "my_flux_dataset_config.toml").write_text(DATA)
    return tmp_path


def on_the_bundle(name: str, steps: int = 2) -> list[str]:
    """The command with the bundled model's file names, a few steps long."""
    made = []
    for word in words(name):
        for big, small in SMALL.items():
            word = word.replace(f"MODELS/{big}.safetensors", f"MODELS/{small}.safetensors")
        made.append(f"--max_train_steps={steps}" if word.startswith("--max_train_epochs") else word)
    return made


@pytest.mark.ledger("KS-52")
@pytest.mark.usefixtures("desk")
@pytest.mark.parametrize("line", [line for line in variations() if line not in REFUSED])
def test_every_variation_lowers_to_a_run(line: str) -> None:
    lowered = lower([*words("lora.args"), *split(line)])
    assert load_config(lowered.tree).config == lowered.config
    text = to_toml(lowered.config, only_set=True)
    assert text.startswith("fluxsmith_config = 1")


@pytest.mark.ledger("KS-52")
@pytest.mark.parametrize("line", variations())
def test_every_variation_trains(desk: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    steps = 12 if "--lr_warmup_steps 10" in line else 2
    code = run(["sd-scripts", *on_the_bundle("lora.args", steps), "--t5xxl_max_token_length=32", *split(line)])
    said = capsys.readouterr()
    if line in REFUSED:
        assert code == 2
        assert REFUSED[line] in said.err
        return
    assert code == 0, said.err
    with open_weights(desk / "output" / "my_flux_lora.safetensors") as weights:
        keys, metadata = set(weights), weights.metadata
    has_blocks = "single_block_indices=10-15" not in line  # the bundled model has four single blocks
    assert any(key.startswith("lora_unet_") and key.endswith(".lora_down.weight") for key in keys) == has_blocks
    assert any(key.startswith("lora_te1_") for key in keys) == ("unet_only" not in line)
    assert metadata["ss_network_module"] == "networks.lora_flux"
    assert metadata["ss_steps"] == str(steps)


@pytest.mark.ledger("KS-38")
@pytest.mark.ledger("KS-40")
def test_the_multi_resolution_file(desk: Path) -> None:
    lowered = lower([*[word for word in words("lora.args") if "dataset_config" not in word], "--dataset_config=multi_resolution.toml"])
    one, held, two = lowered.tree["data"]
    assert [(entry["path"], entry["resolution"], entry["batch_size"]) for entry in (one, held, two)] == [
        ("images", 1024, 2),
        ("held_out", 1024, 2),
        ("images", 768, 3),
    ]
    assert (one["interpolation"], one["validation_share"], held["validation_share"]) == ("lanczos", 0.1, 1.0)
    assert one["group"] == held["group"]
    assert all(entry["flip"] and entry["captions"]["keep_separator"] == "|||" for entry in (one, held, two))


@pytest.mark.ledger("KS-44")
@pytest.mark.usefixtures("desk")
def test_chroma_lowers() -> None:
    lowered = lower(words("chroma.args"))
    assert lowered.config.model.type == "chroma"
    (sample,) = lowered.config.sample
    assert (sample.negative.startswith("low quality"), sample.cfg, sample.guidance, sample.seed, sample.every_epochs) == (
        True,
        4.0,
        0.0,
        1,
        1,
    )
    assert (lowered.config.noise.sampling, lowered.config.noise.guidance) == ("sigmoid", 0.0)
