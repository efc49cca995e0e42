"""Networks: modules, their arguments, text encoders, starting weights."""

from collections.abc import Callable
from pathlib import Path

import pytest

BUNDLE = Path(__file__).resolve().parents[3] / "src" / "fluxsmith" / "bundle" / "flux-shapes"


@pytest.fixture
def adapter(command: Callable) -> Callable:
    """The adapter section of a command with these network_args."""
    return lambda *args: command("--network_train_unet_only", "--network_args", *args).tree["adapter"]


@pytest.mark.ledger("KS-08")
def test_lora_of_sd_scripts_defaults(command: Callable) -> None:
    assert command().tree["adapter"] == {"type": "lora", "rank": 4, "alpha": 1, "targets": "all", "text_encoders": ["clip_l"]}
    assert "alpha" not in command("--network_alpha", "0").tree["adapter"]


@pytest.mark.ledger("KS-32")
def test_rank_by_type(adapter: Callable) -> None:
    made = adapter(
        "img_attn_dim=4",
        "txt_attn_dim=3",
        "img_mlp_dim=8",
        "txt_mlp_dim=0",
        "img_mod_dim=2",
        "txt_mod_dim=2",
        "single_dim=5",
        "single_mod_dim=1",
    )
    assert made["rank_by_type"] == {
        "img_attn": 4, "txt_attn": 3, "img_mlp": 8, "txt_mlp": 0, "img_mod": 2, "txt_mod": 2, "single": 5, "single_mod": 1,
    }  # fmt: skip


@pytest.mark.ledger("KS-33")
def test_in_dims(adapter: Callable) -> None:
    made = adapter("in_dims=[4,0,2,2,6]")
    assert made["targets"] == ["all", "inputs"]
    assert list(made["rank_by_pattern"].values()) == [4, 0, 2, 2, 6]


@pytest.mark.ledger("KS-34")
def test_blocks(adapter: Callable) -> None:
    made = adapter("train_double_block_indices=0,1,8-12,18", "train_single_block_indices=none")
    assert (made["double_blocks"], made["single_blocks"]) == ("0,1,8-12,18", "none")
    assert adapter("train_blocks=single")["double_blocks"] == "none"
    assert adapter("train_blocks=double")["single_blocks"] == "none"


@pytest.mark.ledger("KS-34")
def test_blocks_that_a_small_model_lacks(command: Callable) -> None:
    small = ["--pretrained_model_name_or_path", str(BUNDLE / "dit.safetensors")]
    made = command(*small, "--network_args", "train_double_block_indices=0,1,8-12,18", "train_single_block_indices=10-15")
    assert (made.tree["adapter"]["double_blocks"], made.tree["adapter"]["single_blocks"]) == ("0,1", "none")
    assert "this model has 2 blocks, so 6 of 8 are left out" in made.noted
    assert "there is no block 19" in command("--network_args", "train_double_block_indices=19").refused


@pytest.mark.ledger("KS-35")
@pytest.mark.ledger("KS-36")
def test_patterns(adapter: Callable) -> None:
    made = adapter(r"network_reg_dims=single.*_mod.*=4,img_attn=8", r"network_reg_lrs=single_blocks_(\d|10)_=1e-3,double{1,2}=2e-3")
    assert made["rank_by_pattern"] == {"kohya:single.*_mod.*": 4, "kohya:img_attn": 8}
    assert made["lr_by_pattern"] == {r"kohya:single_blocks_(\d|10)_": 1e-3, "kohya:double{1,2}": 2e-3}
    assert list(adapter("network_reg_dims=a=1,b=2,a=3")["rank_by_pattern"]) == ["kohya:b", "kohya:a"]


@pytest.mark.ledger("KS-30")
@pytest.mark.ledger("KS-31")
def test_extras(adapter: Callable) -> None:
    made = adapter("rank_dropout=0.1", "module_dropout=0.2", "split_qkv=True", "ggpo_sigma=0.03", "ggpo_beta=0.01", "loraplus_lr_ratio=16")
    keys = ("rank_dropout", "module_dropout", "split_qkv", "ggpo_sigma", "ggpo_beta")
    assert [made[key] for key in keys] == [0.1, 0.2, True, 0.03, 0.01]
    assert "split_qkv" not in adapter("split_qkv=False")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("train_duble_block_indices=0", "write train_double_block_indices"),
        ("dropout=0.1", "write --network_dropout"),
        ("split_qkv=yes", "give True or False"),
        ("single_dim=four", "give a whole number"),
        ("in_dims=[1,2]", "five ranks"),
        ("network_reg_dims=(=4", "patterns with ranks"),
        ("network_reg_dims=abc", "patterns with ranks"),
        ("train_double_block_indices=1..3", "block numbers"),
        ("train_blocks=some", "write all, single or double"),
        ("ggpo_sigma=0.1", "add ggpo_beta"),
        ("verbose", "key=value"),
    ],
)
def test_mistakes(command: Callable, word: str, says: str) -> None:
    assert says in command("--network_args", word).refused


@pytest.mark.ledger("KS-37")
@pytest.mark.parametrize(
    ("words", "trained", "rates"),
    [
        ([], ["clip_l"], (None, None)),
        (["--text_encoder_lr", "1e-4", "1e-5"], ["clip_l"], (1e-4, None)),
        (["--network_args", "train_t5xxl=True", "--text_encoder_lr", "1e-4", "1e-5"], ["clip_l", "t5xxl"], (1e-4, 1e-5)),
        (["--network_args", "train_t5xxl=True", "--text_encoder_lr", "1e-5"], ["clip_l", "t5xxl"], (1e-5, 1e-5)),
        (["--network_train_unet_only", "--network_args", "train_t5xxl=True"], [], (None, None)),
        (["--cache_text_encoder_outputs"], ["clip_l"], (None, None)),
    ],
)
def test_text_encoders(command: Callable, words: list[str], trained: list[str], rates: tuple[float | None, float | None]) -> None:
    made = command(*words).tree["adapter"]
    assert made["text_encoders"] == trained
    assert (made.get("clip_l_lr"), made.get("t5xxl_lr")) == rates


def test_text_encoders_only(command: Callable) -> None:
    made = command("--network_train_text_encoder_only").tree["adapter"]
    assert (made["double_blocks"], made["single_blocks"], made["text_encoders"]) == ("none", "none", ["clip_l"])
    assert "nothing would be trained" in command("--network_train_text_encoder_only", "--network_train_unet_only").refused


def test_t5_is_not_trained_from_a_cache(command: Callable) -> None:
    assert "exclude each other" in command("--network_args", "train_t5xxl=True", "--cache_text_encoder_outputs").refused


def test_oft(command: Callable) -> None:
    made = command("--network_module", "networks.oft_flux", "--network_dim", "8", "--network_alpha", "1e-3")
    assert made.tree["adapter"]["type"] == "oft"
    assert made.tree["adapter"]["text_encoders"] == []
    assert made.tree["adapter"]["targets"] != "all"
    assert command("--network_module", "networks.oft_flux", "--network_args", "enable_all_linear=True").tree["adapter"]["targets"] == "all"
    assert "advised: --network_alpha 1e-3" in command("--network_module", "networks.oft_flux").noted


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["algo=lokr", "factor=8", "decompose_both=True"], {"type": "lokr", "factor": 8, "decompose_both": True}),
        (["algo=loha"], {"type": "loha", "rank": 4}),
        (["algo=lora", "dora_wd=True"], {"type": "dora"}),
        (["algo=full"], {"type": "full"}),
        (["algo=lokr", "dora_wd=True", "unbalanced_factorization=True"], {"type": "lokr", "weight_decompose": True, "unbalanced": True}),
        (["algo=diag-oft", "constraint=0.5", "rescaled=True"], {"type": "diag_oft", "constraint": 0.5, "rescale": True}),
        (["algo=boft", "module_dropout=0.1"], {"type": "boft", "module_dropout": 0.1}),
        (["algo=locon", "preset=attn-only", "conv_dim=8"], {"type": "lora", "targets": "attention"}),
    ],
)
def test_lycoris(command: Callable, args: list[str], expected: dict) -> None:
    made = command("--network_module", "lycoris.kohya", "--network_args", *args).tree["adapter"]
    assert {key: made.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--network_module", "networks.lora"], "write networks.lora_flux"),
        (["--network_module", "networks.lora_fluks"], "write networks.lora_flux"),
        (["--network_module", "my.module"], "choose one of networks.lora_flux"),
        (["--network_module", ""], "add --network_module"),
        (["--network_module", "lycoris.kohya", "--network_args", "algo=lokrr"], "write algo=lokr"),
        (["--network_module", "lycoris.kohya", "--network_args", "use_tucker=True"], "leave use_tucker out"),
        (["--network_module", "lycoris.kohya", "--network_args", "preset=x"], "choose one of full"),
        (["--network_module", "lycoris.kohya", "--network_args", "algo=full", "dora_wd=True"], "drop dora_wd"),
        (["--network_module", "lycoris.kohya", "--network_args", "algo=loha", "rank_dropout=0.1"], "write module_dropout"),
        (["--network_module", "networks.oft_flux", "--network_dropout", "0.1"], "oft has no --network_dropout"),
        (["--text_encoder_lr", "1", "2", "3"], "give one, or two"),
        (["--dim_from_weights"], "add --network_weights"),
        (["--base_weights_multiplier", "0.5"], "give one --base_weights file for each"),
    ],
)
def test_modules_and_weights(command: Callable, words: list[str], says: str) -> None:
    assert says in command(*words).refused


@pytest.mark.ledger("KS-51")
def test_starting_weights(command: Callable) -> None:
    made = command("--network_weights", "a.safetensors", "--dim_from_weights").tree["adapter"]
    assert (made["init_from"], made["rank_from_file"], made["init_unused"]) == ("a.safetensors", True, "ignore")
    merged = command("--base_weights", "a", "b", "--base_weights_multiplier", "0.5").tree["base_adapters"]
    assert merged == [{"path": "a", "strength": 0.5}, {"path": "b", "strength": 1.0}]
