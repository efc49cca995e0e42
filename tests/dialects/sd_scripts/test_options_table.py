"""The table of options is complete, says what sd-scripts says, and leaves no option without a fate or an effect."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fluxsmith.config.schema import RunConfig
from fluxsmith.config.sections import section_at
from fluxsmith.dialects.base import Row, read_rows
from fluxsmith.dialects.sd_scripts.lower import STEPS
from fluxsmith.dialects.sd_scripts.scripts import OPTIONS, SCRIPTS, option_rows

PARSER = json.loads((Path(__file__).parent / "parser.json").read_text())
ROWS = read_rows(OPTIONS)
TYPES = {"int|float|percent": "length", "path": "str"}
TRAINING = {script.name for script in SCRIPTS if script.kind == "train"}
OUTSIDE = {"config_file", "inference", "extract", "merge", "convert", "resize", "check", "cache_tool"}  # functions that place no run option


def label(row: Row) -> str:
    return f"{row.name}-{row.scripts[0]}"


@pytest.mark.ledger("KS-52")
@pytest.mark.parametrize("option", PARSER, ids=lambda option: option["name"])
def test_every_option_of_the_parser_has_its_row(option: dict) -> None:
    row = option_rows("flux_train_network").get(option["name"])
    assert row is not None
    assert row.fate in ("kept", "ignored", "refused")
    assert row.type == TYPES.get(option["type"], option["type"])
    assert row.default == (None if option["type"] == "flag" else option["default"])
    assert (row.nargs or None) == option["nargs"]
    assert list(row.choices) == [choice for choice in option["choices"] or [] if choice is not None]


def test_no_row_is_invented() -> None:
    assert set(option_rows("flux_train_network")) == {option["name"] for option in PARSER}
    assert {script: len(option_rows(script)) for script in sorted(TRAINING)} == {
        "flux_train": 194,
        "flux_train_control_net": 193,
        "flux_train_network": 215,
    }


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_every_fate_is_explained(row: Row) -> None:
    """A kept option has a place, the others a reason or a cure."""
    assert bool(row.to) + bool(row.by) == (1 if row.fate == "kept" else 0)
    assert bool(row.why) == (row.fate != "kept")
    assert row.help
    assert set(row.scripts) <= {script.name for script in SCRIPTS}


@pytest.mark.parametrize("row", [row for row in ROWS if row.by], ids=label)
def test_functions_exist(row: Row) -> None:
    assert row.by in {step.__name__ for step in STEPS} | OUTSIDE


@pytest.mark.parametrize("row", [row for row in ROWS if row.to], ids=label)
def test_places_exist(row: Row) -> None:
    """A straight target is an option of a run file (of the plug-in that the dialect chooses)."""
    tree = {"model": {"type": "flux1"}, "adapter": {"type": "lora"}, "objective": {"type": "flow"}, "optim": {"type": "torch"}}
    section, *rest = row.to.split(".")
    found = section_at((section,), tree)
    assert section in RunConfig.model_fields
    assert found is not None
    assert rest[0] in found.model_fields


def test_each_script_has_an_option_once() -> None:
    pairs = [(name, row.name) for row in ROWS for name in row.scripts]
    assert len(pairs) == len(set(pairs))


# One command line for each kept option of the LoRA trainer: what is added, and what has to stand beside it so that it can act.
PROMPTS = ["--sample_prompts", "p.txt", "--sample_every_n_steps", "2"]
EFFECTS: dict[str, tuple[list[str], list[str]]] = {
    "pretrained_model_name_or_path": (["x.safetensors"], []),
    "model_type": (["chroma"], ["--apply_t5_attn_mask"]),
    "clip_l": (["x"], []),
    "t5xxl": (["x"], []),
    "ae": (["x"], []),
    "t5xxl_max_token_length": (["128"], []),
    "apply_t5_attn_mask": ([], []),
    "tokenizer_cache_dir": (["tok"], []),
    "dataset_config": (["other.toml"], []),
    "train_data_dir": (["named"], ["--dataset_config", "", "--resolution", "64"]),
    "reg_data_dir": (["named"], ["--dataset_config", "", "--resolution", "64", "--train_data_dir", "named"]),
    "in_json": (["m.json"], ["--dataset_config", "", "--resolution", "64", "--train_data_dir", "named"]),
    "dataset_repeats": (["3"], []),
    "train_batch_size": (["3"], []),
    "resolution": (["256,512"], ["--dataset_config", "bare.toml"]),
    "enable_bucket": ([], ["--dataset_config", "bare.toml", "--resolution", "512"]),
    "min_bucket_reso": (["128"], []),
    "max_bucket_reso": (["2048"], []),
    "bucket_reso_steps": (["32"], []),
    "bucket_no_upscale": ([], []),
    "resize_interpolation": (["lanczos"], []),
    "caption_extension": ([".cap"], ["--dataset_config", "bare.toml", "--resolution", "512"]),
    "caption_extention": ([".cap"], ["--dataset_config", "bare.toml", "--resolution", "512"]),
    "caption_separator": ([";"], []),
    "shuffle_caption": ([], []),
    "keep_tokens": (["1"], []),
    "keep_tokens_separator": (["|||"], []),
    "secondary_separator": ([";;"], []),
    "enable_wildcard": ([], []),
    "caption_prefix": (["a"], []),
    "caption_suffix": (["b"], []),
    "caption_dropout_rate": (["0.1"], []),
    "caption_dropout_every_n_epochs": (["2"], []),
    "caption_tag_dropout_rate": (["0.1"], []),
    "token_warmup_min": (["2"], ["--token_warmup_step", "10"]),
    "token_warmup_step": (["10"], []),
    "color_aug": ([], []),
    "flip_aug": ([], []),
    "face_crop_aug_range": (["2.0,4.0"], ["--dataset_config", "bare.toml", "--resolution", "512"]),
    "random_crop": ([], []),
    "alpha_mask": ([], []),
    "masked_loss": ([], ["--dataset_config", "masks.toml"]),
    "prior_loss_weight": (["0.5"], ["--dataset_config", "reg.toml"]),
    "network_module": (["networks.oft_flux"], []),
    "network_dim": (["8"], []),
    "network_alpha": (["8"], []),
    "network_dropout": (["0.1"], []),
    "network_args": (["single_dim=2"], []),
    "network_weights": (["x"], []),
    "dim_from_weights": ([], ["--network_weights", "x"]),
    "base_weights": (["a", "b"], []),
    "base_weights_multiplier": (["0.5"], ["--base_weights", "a"]),
    "network_train_unet_only": ([], []),
    "network_train_text_encoder_only": ([], []),
    "unet_lr": (["1e-3"], []),
    "text_encoder_lr": (["1e-5"], []),
    "scale_weight_norms": (["1"], []),
    "training_comment": (["hello"], []),
    "optimizer_type": (["Lion"], []),
    "optimizer_args": (["eps=1e-6"], []),
    "use_8bit_adam": ([], []),
    "use_lion_optimizer": ([], []),
    "learning_rate": (["1e-3"], []),
    "max_grad_norm": (["0"], []),
    "gradient_accumulation_steps": (["2"], []),
    "lr_scheduler": (["cosine"], []),
    "lr_scheduler_type": (["StepLR"], []),
    "lr_scheduler_args": (["step_size=2"], ["--lr_scheduler_type", "StepLR"]),
    "lr_warmup_steps": (["5%"], ["--lr_scheduler", "cosine"]),
    "lr_decay_steps": (["10%"], ["--lr_scheduler", "warmup_stable_decay"]),
    "lr_scheduler_num_cycles": (["2"], ["--lr_scheduler", "cosine_with_restarts"]),
    "lr_scheduler_power": (["2"], ["--lr_scheduler", "polynomial"]),
    "lr_scheduler_timescale": (["50"], ["--lr_scheduler", "inverse_sqrt"]),
    "lr_scheduler_min_lr_ratio": (["0.1"], ["--lr_scheduler", "cosine_with_min_lr"]),
    "loss_type": (["l1"], []),
    "huber_schedule": (["exponential"], ["--loss_type", "huber"]),
    "huber_c": (["0.2"], ["--loss_type", "huber"]),
    "huber_scale": (["0.2"], ["--loss_type", "huber"]),
    "ip_noise_gamma": (["0.1"], []),
    "ip_noise_gamma_random_strength": ([], ["--ip_noise_gamma", "0.1"]),
    "timestep_sampling": (["uniform"], []),
    "sigmoid_scale": (["2"], []),
    "discrete_flow_shift": (["2"], []),
    "model_prediction_type": (["raw"], []),
    "weighting_scheme": (["mode"], []),
    "logit_mean": (["0.1"], []),
    "logit_std": (["2"], []),
    "mode_scale": (["1"], []),
    "guidance_scale": (["1"], []),
    "min_timestep": (["100"], []),
    "max_timestep": (["900"], []),
    "mixed_precision": (["bf16"], []),
    "full_fp16": ([], ["--mixed_precision", "fp16"]),
    "full_bf16": ([], ["--mixed_precision", "bf16"]),
    "fp8_base": ([], ["--mixed_precision", "bf16"]),
    "fp8_base_unet": ([], ["--mixed_precision", "bf16"]),
    "gradient_checkpointing": ([], []),
    "cpu_offload_checkpointing": ([], ["--gradient_checkpointing"]),
    "blocks_to_swap": (["18"], []),
    "split_mode": ([], []),
    "torch_compile": ([], []),
    "deepspeed": ([], []),
    "zero_stage": (["3"], ["--deepspeed"]),
    "offload_optimizer_device": (["cpu"], ["--deepspeed"]),
    "offload_param_device": (["cpu"], ["--deepspeed"]),
    "cache_latents": ([], []),
    "cache_latents_to_disk": ([], []),
    "vae_batch_size": (["4"], []),
    "cache_text_encoder_outputs": ([], []),
    "cache_text_encoder_outputs_to_disk": ([], []),
    "text_encoder_batch_size": (["4"], []),
    "output_dir": (["elsewhere"], []),
    "output_name": (["dogs"], []),
    "save_precision": (["bf16"], []),
    "save_every_n_epochs": (["2"], []),
    "save_every_n_steps": (["2"], []),
    "save_n_epoch_ratio": (["2"], ["--max_train_epochs", "8"]),
    "save_last_n_epochs": (["2"], ["--save_every_n_epochs", "1"]),
    "save_last_n_epochs_state": (["2"], ["--save_every_n_epochs", "1", "--save_state"]),
    "save_last_n_steps": (["20"], ["--save_every_n_steps", "10"]),
    "save_last_n_steps_state": (["20"], ["--save_every_n_steps", "10", "--save_state"]),
    "save_state": ([], []),
    "save_state_on_train_end": ([], []),
    "initial_epoch": (["2"], ["--max_train_epochs", "8"]),
    "initial_step": (["10"], []),
    "max_train_steps": (["10"], []),
    "max_train_epochs": (["10"], []),
    "seed": (["7"], []),
    "no_metadata": ([], []),
    "sample_prompts": (["q.txt"], PROMPTS),
    "sample_every_n_steps": (["4"], PROMPTS),
    "sample_every_n_epochs": (["4"], PROMPTS),
    "sample_at_first": ([], PROMPTS),
    "validation_split": (["0.25"], []),
    "validation_seed": (["5"], ["--validation_split", "0.25"]),
    "validate_every_n_steps": (["5"], ["--validation_split", "0.25"]),
    "validate_every_n_epochs": (["5"], ["--validation_split", "0.25"]),
    "max_validation_steps": (["5"], ["--validation_split", "0.25"]),
    "logging_dir": (["logs"], []),
    "log_with": (["wandb"], ["--logging_dir", "logs"]),
    "log_prefix": (["x_"], ["--logging_dir", "logs"]),
    **{f"metadata_{name}": (["text"], []) for name in ("title", "author", "description", "license", "tags", "usage_hint", "thumbnail")},
    **{f"metadata_{name}": (["text"], []) for name in ("merged_from", "trigger_phrase", "preprocessor", "is_negative_embedding")},
}
NO_TREE = {"resume", "config_file", "output_config", "save_model_as"}  # tested in test_lower_run.py and test_options.py


@pytest.fixture
def files(work: Path) -> None:
    """The files that the commands above name."""
    bare = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "pictures"\n'
    (work / "bare.toml").write_text(bare)
    (work / "other.toml").write_text(bare.replace("pictures", "others") + "num_repeats = 2\n")
    (work / "masks.toml").write_text("[general]\nresolution = 512\n" + bare + 'conditioning_data_dir = "masks"\n')
    (work / "reg.toml").write_text("[general]\nresolution = 512\n" + bare + '[[datasets.subsets]]\nimage_dir = "reg"\nis_reg = true\n')
    (work / "p.txt").write_text("a cat\n")
    (work / "q.txt").write_text("a dog --d 3\n")
    (work / "named" / "5_cat").mkdir(parents=True)
    for name in ("openai_clip-vit-large-patch14", "google_t5-v1_1-xxl"):
        (work / "tok" / name).mkdir(parents=True)


def test_every_kept_option_has_an_example() -> None:
    kept = {name for name, row in option_rows("flux_train_network").items() if row.fate == "kept"}
    assert set(EFFECTS) | NO_TREE == kept


@pytest.mark.ledger("KS-52")
@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("name", EFFECTS)
def test_every_kept_option_changes_the_run(command: Callable, name: str) -> None:
    values, context = EFFECTS[name]
    assert command(*context).tree != command(*context, f"--{name}", *values).tree


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("row", [row for row in option_rows("flux_train_network").values() if row.fate != "kept"], ids=lambda row: row.name)
def test_options_that_are_not_kept_say_why(command: Callable, row: Row) -> None:
    value = [] if row.type == "flag" else [str(row.choices[0])] if row.choices else ["1"]
    made = command(row.flag, *value)
    said = made.refused if row.fate == "refused" else made.noted
    assert row.flag in said
    assert row.why in said
    made.tree["checkpoint"].pop("ss")  # some leave their words in the metadata
    plain = command().tree
    plain["checkpoint"].pop("ss")
    assert made.tree == plain
