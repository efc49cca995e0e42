"""Commands that really train on a model of a few thousand weights: whole models, ControlNets, Chroma, masks, validation, samples."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_run import chroma_model, write_model, write_pictures

from fluxsmith.cli.main import run
from fluxsmith.io.safetensors import open_weights, read_header

DATA = """[general]
caption_extension = ".txt"
enable_bucket = true
bucket_reso_steps = 16
min_bucket_reso = 16

[[datasets]]
resolution = 32
batch_size = 2

  [[datasets.subsets]]
  image_dir = "pictures"
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model files and pictures, made once."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    write_pictures(folder / "pictures", 6)
    return folder


@pytest.fixture
def train(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`train("flux_train", "--full_bf16", data=...)`: two steps; gives what was printed. Raises AssertionError on failure."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(model / "pictures")

    def go(script: str, *words: str, data: str = DATA, code: int = 0) -> str:
        (tmp_path / "data.toml").write_text(data)
        files = {"pretrained_model_name_or_path": "dit", "clip_l": "clip_l", "t5xxl": "t5xxl", "ae": "ae"}
        options = [word for name, file in files.items() for word in (f"--{name}", str(model / f"{file}.safetensors"))]
        options += ["--output_dir", "out", "--output_name", "cats", "--dataset_config", "data.toml", "--max_train_steps", "2"]
        options += ["--t5xxl_max_token_length", "32", "--seed", "1", "--learning_rate", "1e-3"]
        options += ["--network_module", "networks.lora_flux", "--network_dim", "2"] if script == "flux_train_network" else []
        found = run(["sd-scripts", script, *options, *words])
        said = capsys.readouterr()
        assert found == code, said.err
        return said.err + said.out

    return go


def keys(path: str) -> set[str]:
    with open_weights(Path(path)) as weights:
        return set(weights)


@pytest.mark.ledger("KS-53")
@pytest.mark.parametrize(
    "words",
    [
        ["--blockwise_fused_optimizers"],
        ["--fused_backward_pass", "--optimizer_type", "adafactor", "--optimizer_args", "relative_step=False", "scale_parameter=False"],
        ["--mixed_precision", "bf16", "--full_bf16", "--blocks_to_swap", "1"],
    ],
)
def test_whole_models(train: Callable, words: list[str]) -> None:
    train("flux_train", *words)
    assert "double_blocks.0.img_attn.qkv.weight" in keys("out/cats.safetensors")


@pytest.mark.ledger("KS-54")
def test_controlnet(train: Callable, model: Path) -> None:
    (model / "edges").mkdir(exist_ok=True)
    for path in (model / "pictures").glob("*.png"):
        with Image.open(path) as picture:
            picture.convert("L").convert("RGB").save(model / "edges" / path.name)
    Path("edges").symlink_to(model / "edges")
    Path("p.txt").write_text("a cat --w 64 --h 64 --s 1 --cn edges/00.png\n")
    data = DATA + '  conditioning_data_dir = "edges"\n'
    train("flux_train_control_net", "--sample_prompts", "p.txt", "--sample_at_first", data=data)
    assert any(key.startswith("controlnet_blocks.") for key in keys("out/cats.safetensors"))
    assert list(Path("out/sample").glob("cats_*.png"))


@pytest.mark.ledger("KS-44")
def test_chroma(train: Callable, model: Path) -> None:
    chroma = chroma_model(model)
    Path("p.txt").write_text("a cat --n low quality --w 64 --h 64 --d 1 --l 4.0 --g 0.0 --s 2\n")
    words = ["--model_type", "chroma", "--pretrained_model_name_or_path", chroma["path"], "--apply_t5_attn_mask"]
    words += ["--guidance_scale", "0", "--timestep_sampling", "sigmoid", "--model_prediction_type", "raw"]
    train("flux_train_network", *words, "--sample_prompts", "p.txt", "--sample_every_n_steps", "1")
    assert not [key for key in keys("out/cats.safetensors") if "_mod" in key]
    assert len(list(Path("out/sample").glob("cats_*.png"))) >= 2


@pytest.mark.ledger("KS-42")
def test_masks_regularisation_and_augmentation(train: Callable, model: Path) -> None:
    (model / "masks").mkdir(exist_ok=True)
    for path in (model / "pictures").glob("*.png"):
        with Image.open(path) as picture:
            Image.new("L", picture.size, 128).save(model / "masks" / path.name)
    Path("masks").symlink_to(model / "masks")
    Path("reg").symlink_to(model / "pictures")
    data = DATA + '  conditioning_data_dir = "masks"\n  flip_aug = true\n  color_aug = true\n'
    data += '  [[datasets.subsets]]\n  image_dir = "reg"\n  is_reg = true\n  num_repeats = 2\n'
    train("flux_train_network", "--masked_loss", "--prior_loss_weight", "0.5", data=data)
    pictures = len(list((model / "pictures").glob("*.png")))
    metadata = read_header(Path("out/cats.safetensors")).metadata
    assert metadata["ss_prior_loss_weight"] == "0.5"
    assert metadata["ss_num_reg_images"] == str(pictures)
    subsets = [subset for entry in json.loads(metadata["ss_datasets"]) for subset in entry["subsets"]]
    assert [(subset["is_reg"], subset["flip_aug"], subset["color_aug"]) for subset in subsets] == [
        (False, True, True),
        (True, False, False),
    ]
    assert 'mask_dir = "masks"' in Path("out/cats.run/run.toml").read_text()


@pytest.mark.ledger("KS-39")
def test_validation_by_subset(train: Callable) -> None:
    data = DATA + "  validation_split = 0.34\n"
    said = train("flux_train_network", "--validate_every_n_steps", "1", "--blocks_to_swap", "1", data=data)
    events = [json.loads(line) for line in Path("out/cats.run/events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if "Validation" in event.get("event", event.get("type", ""))][:2] == [1, 2], said


@pytest.mark.ledger("KS-07")
@pytest.mark.ledger("KS-51")
def test_names_retention_and_states(train: Callable) -> None:
    words = [
        "--max_train_steps",
        "6",
        "--save_every_n_steps",
        "1",
        "--save_last_n_steps",
        "2",
        "--save_every_n_epochs",
        "1",
        "--save_state",
    ]
    train("flux_train_network", *words)
    names = {path.name for path in Path("out").iterdir()}
    steps = sorted(name for name in names if "-step" in name and name.endswith(".safetensors"))
    assert "cats.safetensors" in names
    assert "cats-000001.safetensors" in names
    assert len(steps) == 3
    assert "cats-state" in names


@pytest.mark.ledger("KS-51")
def test_resume_continues_a_state(train: Callable) -> None:
    train("flux_train_network", "--save_state")
    first = keys("out/cats.safetensors")
    said = train("flux_train_network", "--resume", "out/cats-state", "--max_train_steps", "4", "--save_state")
    assert "step 3/4" in said
    assert keys("out/cats.safetensors") == first


@pytest.mark.ledger("KS-51")
def test_the_same_command_again_starts_anew(train: Callable) -> None:
    train("flux_train_network")
    said = train("flux_train_network", "--network_weights", "out/cats.safetensors", "--dim_from_weights")
    assert "cats.run holds an earlier run, so this one goes to out/cats-2.run" in said
    assert Path("out/cats-2.run/report.html").exists()


@pytest.mark.ledger("KS-51")
def test_resuming_an_older_state_gives_the_same_bits(train: Callable) -> None:
    words = ["--max_train_steps", "4", "--save_every_n_steps", "2", "--save_state", "--lr_scheduler", "cosine"]
    train("flux_train_network", *words)
    with open_weights(Path("out/cats.safetensors")) as weights:
        whole = {name: weights.tensor(name) for name in weights}
    said = train("flux_train_network", *words, "--resume", "out/cats-step00000002-state")
    assert "step 3/4" in said
    assert "step 2/4" not in said
    with open_weights(Path("out/cats.safetensors")) as weights:
        assert all(torch.equal(weights.tensor(name), tensor) for name, tensor in whole.items())


def test_a_state_that_is_not_there(train: Callable) -> None:
    said = train("flux_train_network", "--resume", "out/nothing-state", code=4)
    assert "nothing-state" in said
    assert "Fix:" in said
