"""`--config_file` and `--output_config`, and mistakes in them."""

import tomllib
from pathlib import Path

import pytest

from fluxsmith.dialects.sd_scripts.options import read_options, written_config
from fluxsmith.dialects.sd_scripts.scripts import find_script
from fluxsmith.errors import ConfigError

SCRIPT = find_script("flux_train_network")


def read(*words: str):
    assert SCRIPT is not None
    return read_options(SCRIPT, words)


@pytest.mark.ledger("KS-51")
def test_tables_are_flat_and_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        'seed = 1\n[model]\nae = "a"\n[any]\nlearning_rate = 1e-4\nnetwork_args = ["a=1"]\n'
        'sdpa = true\nflip_aug = false\nlr_warmup_steps = "5%"\n'
    )
    draft = read("--config_file", str(tmp_path / "c"), "--seed", "2")
    assert (draft["seed"], draft["ae"], draft["learning_rate"], draft["network_args"], draft["sdpa"]) == (2, "a", 1e-4, ["a=1"], True)
    assert draft["lr_warmup_steps"] == 0.05
    assert not draft.has("flip_aug")
    assert draft.where("ae") == f"{tmp_path / 'c.toml'}:3:1"


def test_every_mistake_of_the_file_has_its_place(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[x]\nlearning_rat = 1\nseed = "seven"\nloss_type = "l3"\nsdpa = "yes"\n')
    with pytest.raises(ConfigError) as error:
        read("--config_file", str(path), "--max_train_step", "5", "--optmizer_type", "Lion").finish("x")
    lines = error.value.lines()
    assert any("--optmizer_type is not an option. Fix: write --optimizer_type" in line for line in lines)
    assert any(f"{path}:2:1: learning_rat is not an option. Fix: write --learning_rate" in line for line in lines)
    assert any(f"{path}:3:1: --seed = 'seven' is not a whole number" in line for line in lines)
    assert any(f"{path}:4:1: --loss_type has no choice 'l3'" in line for line in lines)
    assert any(f"{path}:5:1: --sdpa = 'yes' is not true or false" in line for line in lines)


@pytest.mark.parametrize("text", [None, "a = = 1", "\xff"])
def test_files_that_cannot_be_read(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "c.toml"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="c.toml"):
        read("--config_file", str(path))


@pytest.mark.ledger("KS-51")
def test_output_config_writes_what_differs_from_defaults(tmp_path: Path) -> None:
    path = tmp_path / "new.toml"
    draft = read(
        "--config_file", str(path), "--output_config", "--seed", "3", "--sdpa", "--learning_rate", "2e-6", "--wandb_api_key", "secret"
    )
    assert written_config(draft) == path
    assert tomllib.loads(path.read_text()) == {"seed": 3, "sdpa": True}
    with pytest.raises(ConfigError, match="is there already"):
        written_config(draft)
    with pytest.raises(ConfigError, match="needs a file"):
        written_config(read("--output_config"))
