"""Files, precision and memory: each option's place, and what excludes what."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fluxsmith.dialects.sd_scripts.lower_model import most_swapped

BUNDLE = Path(__file__).resolve().parents[3] / "src" / "fluxsmith" / "bundle" / "flux-shapes"


@pytest.mark.ledger("KS-01")
def test_a_diffusers_folder_is_refused(command: Callable, work: Path) -> None:
    (work / "FLUX.1-dev").mkdir()
    assert "such as flux1-dev.safetensors" in command("--pretrained_model_name_or_path", "FLUX.1-dev").refused


def test_missing_files_are_named_together(command: Callable) -> None:
    refused = command("--pretrained_model_name_or_path", "", "--clip_l", "", "--t5xxl", "", "--ae", "").refused
    assert all(f"add {name} FILE" in refused for name in ("--pretrained_model_name_or_path", "--clip_l", "--t5xxl", "--ae"))


@pytest.mark.ledger("KS-02")
def test_chroma(command: Callable) -> None:
    made = command("--model_type", "chroma", "--apply_t5_attn_mask")
    assert made.tree["model"] == {
        "type": "chroma",
        "path": "flux1-dev.safetensors",
        "t5xxl": "t5xxl.safetensors",
        "ae": "ae.safetensors",
    }
    assert "Chroma has no CLIP-L" in made.noted
    assert made.tree["adapter"]["text_encoders"] == []


@pytest.mark.ledger("KS-28")
def test_chroma_demands_the_mask(command: Callable) -> None:
    assert "add --apply_t5_attn_mask" in command("--model_type", "chroma").refused
    assert command("--apply_t5_attn_mask").tree["model"]["mask_text"] is True


@pytest.mark.ledger("KS-27")
def test_text_length(command: Callable) -> None:
    assert command("--t5xxl_max_token_length", "256").tree["model"]["t5_length"] == 256


@pytest.mark.ledger("KS-26")
@pytest.mark.parametrize(
    ("option", "right"),
    [
        ("--v2", "--model_type"),
        ("--v_parameterization", "--model_prediction_type"),
        ("--clip_skip=2", "--t5xxl_max_token_length"),
        ("--max_token_length=225", "--t5xxl_max_token_length"),
        ("--split_mode", "--blocks_to_swap"),
    ],
)
def test_options_of_other_models_name_the_right_one(command: Callable, option: str, right: str) -> None:
    line = next(line for line in command(option).report.lines() if option.partition("=")[0] in line)
    assert right in line


@pytest.mark.ledger("KS-13")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ("no", "fp32", "fp32")),
        (["--mixed_precision", "bf16"], ("bf16", "bf16", "fp32")),
        (["--mixed_precision", "fp16"], ("fp16", "fp16", "fp32")),
        (["--mixed_precision", "bf16", "--full_bf16"], ("bf16", "bf16", "bf16")),
        (["--mixed_precision", "fp16", "--full_fp16"], ("fp16", "fp16", "fp16")),
    ],
)
def test_precision(command: Callable, words: list[str], expected: tuple[str, str, str]) -> None:
    train = command(*words).tree["train"]
    assert (train["precision"], train["base_dtype"], train["weights_dtype"]) == expected


def test_precision_of_whole_models(command: Callable) -> None:
    """flux_train loads what it trains in the type of the autocast."""
    train = command("--mixed_precision", "bf16", script="flux_train").tree["train"]
    assert (train["weights_dtype"], train.get("base_dtype")) == ("bf16", None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--full_bf16"], "--full_bf16 needs --mixed_precision bf16"),
        (["--full_fp16", "--mixed_precision", "bf16"], "--full_fp16 needs --mixed_precision fp16"),
        (["--fp8_base"], "--fp8_base needs mixed precision"),
        (["--blocks_to_swap", "36"], "give 0 to 35"),
        (["--blocks_to_swap", "2", "--cpu_offload_checkpointing", "--gradient_checkpointing"], "exclude each other"),
        (["--model_type", "chroma", "--cpu_offload_checkpointing", "--gradient_checkpointing"], "it is not for Chroma"),
    ],
)
@pytest.mark.ledger("KS-23")
def test_what_excludes_what(command: Callable, words: list[str], says: str) -> None:
    assert says in command(*words).refused


@pytest.mark.ledger("KS-20")
def test_fp8(command: Callable) -> None:
    both, only = (command(name, "--mixed_precision", "bf16") for name in ("--fp8_base", "--fp8_base_unet"))
    assert both.tree["quant"] == {"type": "fp8", "compute": "weight_only", "text_encoders": True}
    assert only.tree["quant"] == {"type": "fp8", "compute": "weight_only"}
    assert "scaled row by row" in only.noted


@pytest.mark.ledger("KS-22")
def test_swap(command: Callable) -> None:
    assert command("--blocks_to_swap", "18").tree["memory"]["swap_blocks"] == 18
    assert command("--split_mode").tree["memory"]["swap_blocks"] == 18
    assert command("--split_mode", "--blocks_to_swap", "4").tree["memory"]["swap_blocks"] == 4
    assert command("--blocks_to_swap", "0", "--cpu_offload_checkpointing", "--gradient_checkpointing").tree["memory"] == {
        "checkpointing": True,
        "checkpointing_offload": True,
    }
    old = ["--double_blocks_to_swap", "4", "--single_blocks_to_swap", "8"]
    assert command(*old, script="flux_train_control_net").tree["memory"]["swap_blocks"] == 8


@pytest.mark.ledger("KS-22")
@pytest.mark.ledger("KS-53")
def test_swap_of_trained_blocks(command: Callable) -> None:
    whole = command("--blocks_to_swap", "8", script="flux_train")
    assert whole.tree["memory"] == {"swap_blocks": 8, "checkpointing": True, "optimizer_offload": "states"}
    assert "trained blocks that wait in host memory are updated there" in whole.noted
    fused = command("--blocks_to_swap", "8", "--blockwise_fused_optimizers", script="flux_train")
    assert fused.tree["memory"] == {"swap_blocks": 8, "checkpointing": True, "fused_update": "block"}


@pytest.mark.ledger("KS-22")
def test_swapping_switches_recomputing_on(command: Callable) -> None:
    made = command("--blocks_to_swap", "8")
    assert made.tree["memory"] == {"swap_blocks": 8, "checkpointing": True}
    assert "--gradient_checkpointing is switched on" in made.noted


@pytest.mark.parametrize(("blocks", "most"), [((19, 38), 35), ((2, 4), 1), ((1, 1), 0)])
def test_small_models_keep_two_blocks_of_each_kind(blocks: tuple[int, int], most: int) -> None:
    assert most_swapped(*blocks) == most


def test_swap_on_a_small_model(command: Callable) -> None:
    made = command("--pretrained_model_name_or_path", str(BUNDLE / "dit.safetensors"), "--blocks_to_swap", "18")
    assert made.tree["memory"]["swap_blocks"] == 1
    assert "more than this small model has" in made.noted


@pytest.mark.ledger("KS-53")
def test_fused_updates(command: Callable) -> None:
    adafactor = ["--optimizer_type", "adafactor"]
    assert command("--fused_backward_pass", *adafactor, script="flux_train").tree["memory"]["fused_update"] == "tensor"
    assert command("--blockwise_fused_optimizers", script="flux_train").tree["memory"]["fused_update"] == "block"
    refused = command("--fused_backward_pass", "--gradient_accumulation_steps", "2", script="flux_train").refused
    assert "add --optimizer_type adafactor" in refused
    assert "needs --gradient_accumulation_steps 1" in refused
    assert "two kinds" in command("--fused_backward_pass", "--blockwise_fused_optimizers", *adafactor, script="flux_train").refused


@pytest.mark.ledger("KS-24")
@pytest.mark.ledger("KS-25")
@pytest.mark.parametrize(
    ("words", "latents", "text"),
    [
        ([], "off", "off"),
        (["--cache_latents", "--cache_text_encoder_outputs"], "memory", "memory"),
        (["--cache_latents_to_disk"], "disk", "off"),
        (["--cache_text_encoder_outputs_to_disk"], "off", "disk"),
    ],
)
def test_caches(command: Callable, words: list[str], latents: str, text: str) -> None:
    cache = command(*words).tree["cache"]
    assert (cache["latents"], cache["text"]) == (latents, text)
    assert cache.get("dir") == ("fluxsmith-cache" if "disk" in (latents, text) else None)


def test_tokenizers_of_the_cache_folder(command: Callable, work: Path) -> None:
    (work / "tok" / "openai_clip-vit-large-patch14").mkdir(parents=True)
    made = command("--tokenizer_cache_dir", "tok")
    assert made.tree["model"]["tokenizer"] == "tok/openai_clip-vit-large-patch14"
    assert "google_t5-v1_1-xxl is not there" in made.noted


@pytest.mark.ledger("KS-54")
def test_controlnet(command: Callable) -> None:
    made = command("--controlnet_model_name_or_path", "c.safetensors", script="flux_train_control_net")
    assert made.tree["control"] == [{"type": "controlnet", "train": True, "layout": "pixels", "path": "c.safetensors"}]
    assert command(script="flux_train_control_net").tree["control"] == [{"type": "controlnet", "train": True, "layout": "pixels"}]
