"""The cache tools fill the caches that a training on the same data finds."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import write_model

from fluxsmith.cli.main import run
from fluxsmith.dialects.sd_scripts.cache_tool import cache_request
from fluxsmith.dialects.sd_scripts.options import read_options
from fluxsmith.dialects.sd_scripts.scripts import split_command
from fluxsmith.errors import ConfigError

DATA = ["--dataset_config", "data.toml"]


@pytest.fixture
def small(work: Path) -> Path:
    (work / "data.toml").write_text((work / "data.toml").read_text().replace("resolution = 512", "resolution = 32\nbucket_reso_steps = 16"))
    return write_model(work / "model")


@pytest.mark.ledger("KS-24")
@pytest.mark.ledger("KS-25")
def test_a_training_finds_what_the_tools_made(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: ["--" + name, str(small / f"{name}.safetensors")] for name in ("clip_l", "t5xxl", "ae")}
    length = ["--t5xxl_max_token_length", "32"]
    assert run(["sd-scripts", "tools/cache_latents.py", "--flux", *files["ae"], *DATA]) == 0
    assert run(["sd-scripts", "cache_text_encoder_outputs", "--flux", *files["clip_l"], *files["t5xxl"], *DATA, *length]) == 0
    assert "text of 4 pictures are in fluxsmith-cache" in capsys.readouterr().out
    words = [
        "--pretrained_model_name_or_path",
        str(small / "dit.safetensors"),
        *files["clip_l"],
        *files["t5xxl"],
        *files["ae"],
        *DATA,
        *length,
    ]
    words += ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--network_train_unet_only", "--max_train_steps", "1"]
    words += ["--network_module", "networks.lora_flux", "--output_dir", "out", "--seed", "1"]
    assert run(["sd-scripts", "flux_train_network", *words]) == 0
    said = capsys.readouterr().err
    assert "latents cache: 4 valid" in said
    assert "text cache: 4 valid" in said


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("cache_latents --ae a --dataset_config data.toml", "add --flux"),
        ("cache_latents --flux --dataset_config data.toml", "add --ae"),
        ("cache_text_encoder_outputs --flux --sdxl --t5xxl a --dataset_config data.toml", "only FLUX models are known.*add --clip_l"),
        ("cache_latents --flux --ae a", "add --dataset_config"),
    ],
)
@pytest.mark.usefixtures("work")
def test_mistakes(line: str, says: str) -> None:
    script, rest, _ = split_command(line.split())
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        cache_request(read_options(script, rest))


@pytest.mark.usefixtures("work")
def test_chroma_needs_t5_only(command: Callable) -> None:
    script, rest, _ = split_command(["cache_text_encoder_outputs", "--flux", "--model_type", "chroma", "--t5xxl", "t", *DATA])
    made = cache_request(read_options(script, rest))
    assert (made.config.model.type, made.config.cache.text, made.config.cache.latents) == ("chroma", "disk", "off")
