"""Adapter files carry what sd-scripts' files carry, in the same form; pictures carry their settings."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fluxsmith.io.metadata import ModelSpec, TrainingFacts, legacy_file_hash, modelspec, png_text, training_metadata, with_hashes

SD_SCRIPTS_KEYS = set(
    re.findall(
        r"\w+",
        """
session_id training_started_at training_finished_at output_name training_comment sd_scripts_commit_hash learning_rate unet_lr
text_encoder_lr optimizer max_grad_norm lr_scheduler lr_warmup_steps num_train_images num_validation_images num_reg_images
num_batches_per_epoch num_epochs epoch max_train_steps steps gradient_checkpointing gradient_accumulation_steps mixed_precision full_fp16
fp8_base fp8_base_unet lowram cache_latents network_module network_dim network_alpha network_dropout network_args scale_weight_norms
base_model_version v2 clip_skip max_token_length seed noise_offset noise_offset_random_strength multires_noise_iterations
multires_noise_discount adaptive_noise_scale zero_terminal_snr ip_noise_gamma ip_noise_gamma_random_strength caption_dropout_rate
caption_dropout_every_n_epochs caption_tag_dropout_rate face_crop_aug_range resize_interpolation prior_loss_weight min_snr_gamma
debiased_estimation loss_type huber_schedule huber_scale huber_c validation_seed validation_split max_validation_steps
validate_every_n_epochs validate_every_n_steps model_type apply_t5_attn_mask weighting_scheme logit_mean logit_std mode_scale
guidance_scale timestep_sampling sigmoid_scale model_prediction_type discrete_flow_shift sd_model_name vae_name datasets tag_frequency
dataset_dirs
""",
    )
)


def facts(**changes: object) -> TrainingFacts:
    values: dict[str, object] = {
        "output_name": "cats", "session_id": "12", "started_at": 1.5, "rank": 16, "alpha": 8.0, "learning_rate": 1e-4,
        "adapter_args": {"targets": "all"}, "dit_file": Path("/secret/user/flux1-dev.safetensors"), "ae_file": Path("/x/ae.safetensors"),
        "datasets": [{"resolution": [512, 512], "subsets": [{"image_dir": "cats"}]}],
        "tag_frequency": {"cats": {"cat": 3}}, "dataset_dirs": {"cats": {"n_repeats": 1, "img_count": 3}},
        "options": {"timestep_sampling": "sigmoid"},
    }  # fmt: skip
    return TrainingFacts(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.ledger("KS-08")
def test_the_full_set_of_keys() -> None:
    metadata = training_metadata(facts(), ModelSpec("Cats"))
    assert {key for key in metadata if key.startswith("ss_")} == {f"ss_{key}" for key in SD_SCRIPTS_KEYS}
    assert all(isinstance(value, str) for value in metadata.values())
    assert metadata["ss_network_dim"] == "16"
    assert metadata["ss_network_alpha"] == "8.0"
    assert metadata["ss_noise_offset"] == "None"
    assert metadata["ss_lowram"] == "False"
    assert metadata["ss_timestep_sampling"] == "sigmoid"
    assert json.loads(metadata["ss_network_args"]) == {"targets": "all"}
    assert json.loads(metadata["ss_tag_frequency"]) == {"cats": {"cat": 3}}
    assert json.loads(metadata["ss_datasets"])[0]["subsets"] == [{"image_dir": "cats"}]


def test_paths_stay_private() -> None:
    metadata = training_metadata(facts(), ModelSpec("Cats"))
    assert metadata["ss_sd_model_name"] == "flux1-dev.safetensors"
    assert "secret" not in json.dumps(metadata)


def test_short_hash_of_the_base(tmp_path: Path) -> None:
    (tmp_path / "dit.safetensors").write_bytes(b"x" * 2_000_000)
    metadata = training_metadata(facts(dit_file=tmp_path / "dit.safetensors"), ModelSpec("Cats"))
    assert metadata["ss_sd_model_hash"] == legacy_file_hash(tmp_path / "dit.safetensors")


def test_minimal_keeps_only_what_loaders_need() -> None:
    metadata = training_metadata(facts(), ModelSpec("Cats"), minimal=True)
    assert {key for key in metadata if key.startswith("ss_")} == {
        "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
    }  # fmt: skip
    assert "cat" not in json.dumps(metadata).replace("Cats", "")


def test_modelspec() -> None:
    spec = modelspec(ModelSpec("Cats", trigger_phrase="ohwx", resolution=(512, 768), date=0.0, timestep_range=(0, 500)))
    assert spec["modelspec.sai_model_spec"] == "1.0.1"
    assert spec["modelspec.architecture"] == "flux-1-dev/lora"
    assert spec["modelspec.resolution"] == "512x768"
    assert spec["modelspec.trigger_phrase"] == "ohwx"
    assert spec["modelspec.timestep_range"] == "0,500"
    assert spec["modelspec.date"][4] == "-"
    assert "modelspec.author" not in spec
    names = {variant: modelspec(ModelSpec("x", variant, adapter="")) for variant in ("schnell", "chroma", "kontext", "new")}
    assert [spec["modelspec.architecture"] for spec in names.values()] == ["flux-1-schnell", "chroma", "flux-1-dev", "flux-1"]
    assert "lodestones" in names["chroma"]["modelspec.implementation"]


@pytest.mark.ledger("KS-08")
@pytest.mark.parametrize("size", [10, 300_000, 265_000])
def test_hashes_equal_those_of_the_serialised_file(size: int) -> None:
    tensors = {"b": torch.rand(size), "a": torch.rand(7).to(torch.bfloat16), "c": torch.tensor(4.0)}
    metadata = {"ss_one": "1", "modelspec.title": "x"}
    hashed = with_hashes(tensors, metadata)
    content = safetensors.torch.save(tensors, {"ss_one": "1"})
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert hashed["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert hashed["sshs_legacy_hash"] == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    assert hashed["modelspec.title"] == "x"


def test_file_hash(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert legacy_file_hash(tmp_path / "a") == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]


def test_png_text() -> None:
    settings = {"prompt": "a cat\non a mat", "negative": "dog", "steps": 20, "sampler": "euler", "cfg": 1.0, "guidance": 3.5,
                "seed": 7, "width": 512, "height": 768, "strength": 1.0}  # fmt: skip
    text = png_text(settings, model="flux1-dev")
    lines = text["parameters"].split("\n")
    assert lines[:3] == ["a cat", "on a mat", "Negative prompt: dog"]
    assert lines[3].startswith(
        "Steps: 20, Sampler: Euler, CFG scale: 1.0, Distilled CFG Scale: 3.5, Seed: 7, Size: 512x768, Model: flux1-dev"
    )
    record = json.loads(text["fluxsmith"])
    assert {**settings, "model": "flux1-dev"}.items() <= record.items()
