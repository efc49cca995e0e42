"""sd-scripts' file names, windows and state folders, and resuming from a state that lies anywhere."""

import re
from pathlib import Path

import pytest
import tiny_run
from ran import Go, same

from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.io.safetensors import read_header
from fluxsmith.train.run import train

LORA = {**tiny_run.LORA, "adapter.targets": "attention", "train.accumulation": 1, "schedule.name": "constant"}
FOREIGN = {**LORA, "checkpoint.naming": "sd-scripts"}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


@pytest.mark.ledger("KS-07")
def test_names_after_epochs_and_steps(go: Go, tmp_path: Path) -> None:
    """13 single pictures an epoch; the last epoch is the final file alone."""
    out = tmp_path / "out"
    changes = {**FOREIGN, "train.steps": None, "train.epochs": 2, "checkpoint.every": 10, "checkpoint.every_epochs": 1}
    ran = go({**changes, "checkpoint.weights_dir": str(out)})
    assert ran.error is None
    assert files(out) == ["w-000001.safetensors", "w-step00000010.safetensors", "w-step00000020.safetensors", "w.safetensors"]
    assert not (ran.folder / "weights").exists()
    metadata = read_header(out / "w-000001.safetensors").metadata
    assert (metadata["ss_epoch"], metadata["ss_steps"], metadata["ss_output_name"]) == ("1", "13", "w-000001")


@pytest.mark.ledger("KS-07")
def test_windows(go: Go) -> None:
    """keep_steps counts steps: after step 10, those of 10 - 4 and later; keep_epochs counts saved epochs."""
    steps = go({**FOREIGN, "train.steps": 11, "checkpoint.every": 2, "checkpoint.keep_steps": 4}, "steps")
    numbered = [name for name in files(steps.folder / "weights") if "step" in name]
    assert numbered == ["w-step00000006.safetensors", "w-step00000008.safetensors", "w-step00000010.safetensors"]
    epochs = {**FOREIGN, "train.steps": None, "train.epochs": 4, "checkpoint.every_epochs": 1, "checkpoint.keep_epochs": 2}
    assert files(go(epochs, "epochs").folder / "weights") == ["w-000002.safetensors", "w-000003.safetensors", "w.safetensors"]


@pytest.mark.ledger("KS-51")
def test_states_are_put_where_users_look(go: Go, tmp_path: Path) -> None:
    out = tmp_path / "out"
    states = {"checkpoint.state_dir": str(out), "checkpoint.every": 2, "checkpoint.keep_state_steps": 2}
    go({**FOREIGN, **states})
    assert sorted(path.name for path in out.iterdir()) == ["w-state", "w-step00000002-state", "w-step00000004-state"]
    end = go({**FOREIGN, **states, "checkpoint.state_at": "end", "checkpoint.state_dir": str(tmp_path / "states")}, "end")
    assert end.error is None
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["w-state"]


@pytest.mark.ledger("KS-51")
def test_a_state_from_anywhere_continues_exactly(go: Go, run_config, tmp_path: Path) -> None:
    out = tmp_path / "out"
    changes = {**FOREIGN, "checkpoint.state_dir": str(out), "checkpoint.every": 2}
    straight = go(changes, "one")
    other = run_config(changes, "other")
    train(other, resume=out / "w-step00000002-state")
    assert same(straight.weights, go({**changes, "train.steps": 4}, "other", resume=True).weights)
    rows = (other.run.dir / "metrics.jsonl").read_text().splitlines()
    assert [row.split('"loss_hex"')[1] for row in rows] == [row.split('"loss_hex"')[1] for row in
                                                             (straight.folder / "metrics.jsonl").read_text().splitlines()[2:]]  # fmt: skip


def test_going_back_to_an_earlier_state_sets_later_ones_aside(go: Go, run_config, tmp_path: Path) -> None:
    changes = {**FOREIGN, "checkpoint.state_dir": str(tmp_path / "out"), "checkpoint.every": 2}
    before = go(changes, "one")
    again = run_config(changes, "one")
    train(again, resume=tmp_path / "out" / "w-step00000002-state")
    assert (again.run.dir / "state" / "set-aside" / "step-000004" / "MANIFEST.json").is_file()
    assert same(before.weights, before.tensors(4))


def test_a_folder_that_is_no_state(go: Go, run_config, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(ModelFileError, match="MANIFEST"):
        train(run_config(FOREIGN), resume=tmp_path / "x")


@pytest.mark.ledger("KS-51")
def test_a_run_that_begins_later(go: Go) -> None:
    """Without a state: data, noise and schedule of the later steps."""
    whole, late = go(FOREIGN, "whole"), go({**FOREIGN, "train.first_step": 2}, "late")
    assert [row["step"] for row in late.rows] == [3, 4]
    assert late.losses != whole.losses[2:]  # fresh weights
    zero = {**FOREIGN, "adapter.dit_lr": 1e-30}
    assert go({**zero, "train.first_step": 2}, "late0").losses == go(zero, "whole0").losses[2:]
    epoch = go({**FOREIGN, "train.steps": 15, "train.first_epoch": 2}, "epoch")
    assert [row["step"] for row in epoch.rows] == [14, 15]
    with pytest.raises(ConfigError, match="begin at step 4"):
        raise go({**FOREIGN, "train.first_step": 4}, "none").error or AssertionError


def test_metadata_of_the_users_choice(go: Go, tmp_path: Path) -> None:
    picture = tmp_path / "thumb.png"
    picture.write_bytes(b"\x89PNG")
    extra = {"description": "a cat", "tags": "cat, pet", "thumbnail": str(picture), "preprocessor": "none"}
    changes = {
        "checkpoint.ss": {"network_args": '{"a": "b"}'},
        "checkpoint.modelspec": extra,
        "checkpoint.comment": "first try",
        "noise.min_sigma": 0.1,
    }
    ran = go({**FOREIGN, **changes})
    metadata = read_header(ran.folder / "weights" / "w.safetensors").metadata
    assert metadata["modelspec.description"] == "a cat"
    assert metadata["modelspec.preprocessor"] == "none"
    assert metadata["modelspec.thumbnail"] == "data:image/png;base64,iVBORw=="
    assert metadata["modelspec.timestep_range"] == "100,1000"
    assert metadata["ss_training_comment"] == "first try"
    assert metadata["ss_network_args"] == '{"a": "b"}'


@pytest.mark.ledger("KS-43")
def test_pictures_have_sd_scripts_names(go: Go, tmp_path: Path) -> None:
    """Before training, at steps, after epochs; not after the last step unless it is due."""
    sample = {"prompt": "a red circle", "width": 32, "height": 32, "steps": 1, "seed": 7, "last": False}
    out = tmp_path / "out"
    changes = {**FOREIGN, "checkpoint.weights_dir": str(out), "train.steps": 14}
    ran = go({**changes, "sample": [{**sample, "every": 10}, {**sample, "every_epochs": 1, "first": False}]})
    assert ran.warnings == ""
    names = sorted(re.sub(r"\d{14}", "TIME", path.name) for path in (out / "sample").iterdir())
    assert names == ["w_000000_00_TIME_7.png", "w_000010_00_TIME_7.png", "w_e000001_01_TIME_7.png"]
    assert not (ran.folder / "samples").exists()
