"""Length, noise, files, states, samples, validation and logs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fluxsmith.dialects.sd_scripts.lower import lower
from fluxsmith.errors import ConfigError


@pytest.mark.ledger("KS-18")
@pytest.mark.ledger("KS-52")
def test_foreign_defaults_are_explicit_and_advised_against(command: Callable) -> None:
    made = command()
    noise = made.tree["noise"]
    assert (noise["sampling"], noise["prediction"], noise["guidance"], noise["shift"], noise["weighting"]) == (
        "sigma",
        "sigma_scaled",
        3.5,
        3.0,
        "none",
    )
    assert (made.tree["train"]["steps"], made.tree["train"]["precision"], made.tree["optim"]["lr"]) == (1600, "no", 2e-6)
    for option, advice in (
        ("--model_prediction_type", "advised: raw"),
        ("--timestep_sampling", "advised: flux_shift"),
        ("--guidance_scale", "1.0 for dev"),
    ):
        line = next(line for line in made.report.lines() if line.startswith(f"default: {option}:"))
        assert advice in line
    told = command("--model_prediction_type", "sigma_scaled")
    assert "default: --model_prediction_type" not in told.noted


@pytest.mark.ledger("KS-18")
@pytest.mark.parametrize(
    ("words", "native"),
    [
        (["--weighting_scheme", "uniform"], "none"),
        (["--weighting_scheme", "logit_normal"], "logit_normal"),
        (["--weighting_scheme", "logit_normal", "--timestep_sampling", "shift"], "none"),
        (["--weighting_scheme", "cosmap"], "cosmap"),
        (["--weighting_scheme", "cosmap", "--model_prediction_type", "raw"], "none"),
    ],
)
def test_weighting(command: Callable, words: list[str], native: str) -> None:
    made = command(*words)
    assert made.tree["noise"]["weighting"] == native
    assert ("in sd-scripts neither" in made.noted) == (native == "none" and "uniform" not in words)


def test_timestep_range_takes_effect(command: Callable) -> None:
    made = command("--min_timestep", "200", "--max_timestep", "700", "--validation_split", "0.5")
    assert (made.tree["noise"]["min_sigma"], made.tree["noise"]["max_sigma"]) == (0.2, 0.7)
    assert made.tree["validation"]["sigmas"] == [0.3, 0.4, 0.5, 0.6]
    assert "takes effect here" in made.noted


def test_huber(command: Callable) -> None:
    made = command("--loss_type", "smooth_l1", "--huber_c", "0.2")
    assert made.tree["objective"] == {"type": "flow", "loss": "smooth_l1", "huber_schedule": "constant", "huber_c": 0.2, "huber_scale": 1.0}
    assert "constant is used" in made.noted
    assert "huber_c: has no effect" in command("--huber_c", "0.2").noted


@pytest.mark.ledger("KS-12")
def test_length(command: Callable) -> None:
    made = command("--max_train_epochs", "3", "--max_train_steps", "10").tree["train"]
    assert made["epochs"] == 3
    assert "steps" not in made
    assert "give 1 or more" in command("--max_train_steps", "0").refused


def test_seed_is_said(command: Callable) -> None:
    made = command()
    assert made.tree["train"]["seed"] == 42
    assert "--seed: not given: 42 is used" in made.noted
    assert command("--seed", "3").tree["train"]["seed"] == 3


@pytest.mark.ledger("KS-07")
def test_files_and_their_retention(command: Callable) -> None:
    words = (
        "--save_precision fp16 --save_every_n_epochs 2 --save_last_n_epochs 3 --save_every_n_steps 10 --save_last_n_steps 30 --no_metadata"
    )
    made = command(*words.split()).tree
    assert made["run"] == {"dir": "out/cats.run", "name": "cats"}
    assert made["checkpoint"] == {
        "naming": "sd-scripts",
        "weights_dir": "out",
        "dtype": "fp16",
        "every_epochs": 2,
        "every": 10,
        "keep_epochs": 3,
        "keep_steps": 30,
        "metadata": "minimal",
        "ss": {"network_args": "{}"},
    }


@pytest.mark.ledger("KS-08")
def test_words_of_sd_scripts_reach_the_metadata(command: Callable) -> None:
    words = ["--network_args", "img_attn_dim=4", "--optimizer_type", "AdamW8bit", "--optimizer_args", "eps=1e-6", "--clip_skip", "2"]
    made = command(*words, "--lr_scheduler", "cosine", "--text_encoder_lr", "1e-5").tree["checkpoint"]["ss"]
    assert made == {
        "network_args": '{"img_attn_dim": "4"}',
        "optimizer": "AdamW8bit(eps=1e-6)",
        "clip_skip": "2",
        "lr_scheduler": "cosine",
        "text_encoder_lr": "[1e-05]",
    }


def test_file_type_follows_the_trained_weights(command: Callable) -> None:
    assert command().tree["checkpoint"]["dtype"] == "fp32"
    assert command("--full_bf16", "--mixed_precision", "bf16").tree["checkpoint"]["dtype"] == "bf16"
    assert command("--save_precision", "float").tree["checkpoint"]["dtype"] == "fp32"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--save_model_as", "ckpt"], "write --save_model_as safetensors"),
        (["--output_dir", ""], "add --output_dir"),
        (["--save_n_epoch_ratio", "4"], "add --max_train_epochs N"),
        (["--initial_epoch", "2"], "add --max_train_epochs N"),
        (["--initial_step", "1600"], "raise --max_train_steps"),
        (["--min_timestep", "1001"], "give 0 to 1000"),
        (["--log_with", "tensorboard"], "add --logging_dir"),
        (["--sample_every_n_steps", "5"], "add --sample_prompts"),
    ],
)
def test_what_cannot_be_done(command: Callable, words: list[str], says: str) -> None:
    assert says in command(*words).refused


@pytest.mark.ledger("KS-51")
def test_states(command: Callable) -> None:
    made = command("--save_state", "--save_every_n_steps", "5", "--save_last_n_steps_state", "10").tree["checkpoint"]
    assert (made["state_dir"], made["state_at"], made["keep_state_steps"]) == ("out", "checkpoints", 10)
    assert command("--save_state_on_train_end").tree["checkpoint"]["state_at"] == "end"


@pytest.mark.ledger("KS-51")
def test_resume(command: Callable) -> None:
    made = command("--resume", "out/cats-state", "--initial_step", "5", "--skip_until_initial_step")
    assert made.tree["train"]["steps"] == 1600
    assert "the state knows its step" in made.noted
    assert "--skip_until_initial_step: a resumed run always continues" in made.noted


@pytest.mark.ledger("KS-51")
def test_a_start_without_a_state_shortens_the_run(command: Callable) -> None:
    assert command("--initial_step", "600").tree["train"]["steps"] == 1000
    assert command("--initial_epoch", "3", "--max_train_epochs", "10").tree["train"]["epochs"] == 8


@pytest.mark.ledger("KS-43")
def test_cadence_of_samples(command: Callable, work: Path) -> None:
    (work / "p.txt").write_text("a cat\na dog --d 7\n")
    cadence = ("every", "every_epochs", "first", "last")
    prompts = ["--sample_prompts", "p.txt"]
    made = command(*prompts, "--sample_every_n_steps", "5", "--sample_at_first")
    assert [[entry[key] for key in cadence] for entry in made.tree["sample"]] == [[5, 0, True, False]] * 2
    assert [entry["seed"] for entry in made.tree["sample"]] == [42, 7]
    epochs = command(*prompts, "--sample_every_n_steps", "5", "--sample_every_n_epochs", "2")
    assert [epochs.tree["sample"][0][key] for key in cadence] == [0, 2, False, False]
    assert "has no effect beside" in epochs.noted
    never = command(*prompts, "--sample_every_n_steps", "-1")
    assert "sample" not in never.tree
    assert "nothing says when" in never.noted


@pytest.mark.ledger("KS-39")
def test_validation(command: Callable) -> None:
    words = "--validation_split 0.25 --validation_seed 5 --validate_every_n_steps 20 --validate_every_n_epochs 3 --max_validation_steps 2"
    made = command(*words.split()).tree
    assert made["validation"] == {"every": 20, "every_epochs": 3, "seed": 5, "sigmas": [0.2, 0.4, 0.6, 0.8], "max_batches": 2}
    assert made["data"][0]["validation_share"] == 0.25
    assert "validation" not in command("--validate_every_n_steps", "20").tree


def test_logs(command: Callable) -> None:
    made = command("--logging_dir", "logs", "--log_prefix", "x_", "--log_with", "all")
    assert made.tree["sinks"] == [{"type": "tensorboard", "dir": "logs/x_cats"}]
    assert "no Weights & Biases" in made.noted
    assert "has no effect without --logging_dir" in command("--log_prefix", "x").noted


def test_findings_of_the_run_name_the_option(base_words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        lower([*base_words, "--min_timestep", "900", "--max_timestep", "100"])
    assert error.value.problems[0].where in ("--min_timestep", "--max_timestep")
    assert "cannot be run" in str(error.value)


@pytest.mark.ledger("KS-52")
def test_everything_wrong_is_said_at_once(base_words: list[str]) -> None:
    words = ["--sdpaa", "--seed", "x", "--network_args", "img_atn_dim=3", "--optimizer_args", "a", "--lr_scheduler", "cosne"]
    with pytest.raises(ConfigError) as error:
        lower([*base_words, *words, "--full_bf16"])
    text = "\n".join(error.value.lines())
    for part in (
        "write --sdpa",
        "--seed = 'x'",
        "write img_attn_dim",
        "write it as key=value",
        "write cosine",
        "add --mixed_precision bf16",
    ):
        assert part in text
