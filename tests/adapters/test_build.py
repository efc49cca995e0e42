"""What all kinds share in training: rates and LoRA+, patterns in sd-scripts' names, norm limits, starting files, text encoders."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fluxsmith.adapters import loha, lokr, oft
from fluxsmith.adapters.formats.files import read_adapter, write_adapter
from fluxsmith.adapters.load import load_adapter, norm_of
from fluxsmith.adapters.lora import Config
from fluxsmith.adapters.rows import part_modules
from fluxsmith.config.choice import config_class, realise
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.models.flux import FluxDiT
from fluxsmith.optim.groups import Group, as_torch_groups

QKV = "dit.double_blocks.0.img_attn.qkv"
CLIP_Q = "clip_l.text_model.encoder.layers.0.self_attn.q_proj"


def randomised(made, std: float = 0.5):
    torch.manual_seed(4)
    with torch.no_grad():
        for param in made.params.values():
            param.normal_(std=std)
    return made


# ---- rates ----------------------------------------------------------------------------------------------------------


def test_loraplus_ratios(models: dict[str, nn.Module]) -> None:
    made = Config(
        text_encoders=("clip_l",), loraplus_ratio=4, loraplus_text_ratio=8, lr_by_pattern={"kohya:single_blocks": 1e-3}, rank=2
    ).build(models)
    assert {(group.name, group.lr, group.lr_factor) for group in made.groups} == {
        ("dit", None, 1.0), ("dit up", None, 4.0), ("dit lr 0.001", 1e-3, 1.0), ("dit lr 0.001 up", 1e-3, 4.0),
        ("clip_l", None, 1.0), ("clip_l up", None, 8.0),
    }  # fmt: skip
    made = {name: Config(loraplus_dit_ratio=2, loraplus_ratio=4).plus_ratio(name) for name in ("dit", "clip_l", "t5xxl")}
    assert made == {"dit": 2.0, "clip_l": 4.0, "t5xxl": 4.0}


@pytest.mark.ledger("KS-36")
def test_the_last_pattern_gives_the_rate(dit: FluxDiT) -> None:
    patterns = {r"double_blocks": 1e-3, r"kohya:lora_unet_double_blocks_0_img_attn": 5e-4, r"\.0\.img_attn\.qkv:v": 2e-4}
    made = Config(rank=2, split_qkv=True, lr_by_pattern=patterns).build({"dit": dit})
    rates = {id(param): group.lr for group in made.groups for param in group.params}
    assert rates[id(made.params[f"{QKV}.q.down"])] == 5e-4
    assert rates[id(made.params[f"{QKV}.v.down"])] == 2e-4
    assert rates[id(made.params["dit.double_blocks.1.img_mod.lin.up"])] == 1e-3
    assert rates[id(made.params["dit.single_blocks.0.linear2.up"])] is None


@pytest.mark.ledger("KS-37")
def test_a_rate_of_zero_keeps_the_adapter_out_of_the_optimizer_alone(models: dict[str, nn.Module]) -> None:
    made = Config(rank=2, text_encoders=("clip_l", "t5xxl"), clip_l_lr=0.0, t5xxl_lr=3e-5, lr_by_pattern={"single": 0.0}).build(models)
    groups = as_torch_groups([Group(g.name, g.params, g.lr, g.lr_factor) for g in made.groups], lr=1e-4)
    assert {group["name"]: group["lr"] for group in groups} == {"dit": 1e-4, "t5xxl": 3e-5}
    optimised = {id(param) for group in groups for param in group["params"]}
    assert id(made.params[f"{CLIP_Q}.down"]) not in optimised
    assert id(made.params["dit.single_blocks.0.linear1.down"]) not in optimised
    assert {CLIP_Q, "dit.single_blocks.0.linear1"} <= made.state().layers.keys()
    assert made.bases[CLIP_Q].adapters


# ---- patterns in sd-scripts' names ----------------------------------------------------------------------------------


@pytest.mark.ledger("KS-35")
def test_ranks_by_sd_scripts_names(models: dict[str, nn.Module]) -> None:
    patterns = {
        r"kohya:lora_unet_double_blocks_\d_img": 8,
        r"kohya:_attn_qkv$": 3,
        r"kohya:single_blocks_1_": 0,
        r"kohya:lora_te1_.*_q_proj": 5,
    }
    made = Config(rank=2, rank_by_pattern=patterns, text_encoders=("clip_l",)).build(models)
    ranks = {path: layer.rank for path, layer in made.state().layers.items()}
    assert ranks[QKV] == 3
    assert ranks["dit.double_blocks.1.img_mlp.0"] == 8
    assert ranks["dit.double_blocks.1.txt_mlp.0"] == 2
    assert not any(path.startswith("dit.single_blocks.1.") for path in ranks)
    assert ranks[CLIP_Q] == 5
    assert ranks[CLIP_Q.replace("q_proj", "v_proj")] == 2


def test_targets_excludes_and_alphas_by_sd_scripts_names(dit: FluxDiT) -> None:
    made = Config(
        rank=2,
        targets=(r"kohya:^lora_unet_single_blocks_\d+_linear2$", r"kohya:time_in_in_layer"),
        exclude=(r"kohya:blocks_2_",),
        alpha_by_pattern={r"kohya:time_in": 7.0},
    ).build({"dit": dit})
    assert set(made.adapters) == {"dit.single_blocks.0.linear2", "dit.single_blocks.1.linear2", "dit.time_in.in_layer"}
    assert made.state().layers["dit.time_in.in_layer"].parts[0].alpha == 7.0
    with pytest.raises(ValueError, match="is not a regular expression"):
        Config(rank_by_pattern={"kohya:(": 4})


@pytest.mark.ledger("KS-33")
def test_input_layers_each_with_a_rank(dit: FluxDiT, tmp_path: Path) -> None:
    """in_dims=[4,0,2,3,5] of sd-scripts: img, time, vector, guidance, txt."""
    ranks = {r"dit\.img_in": 4, r"dit\.time_in": 0, r"dit\.vector_in": 2, r"dit\.guidance_in": 3, r"dit\.txt_in": 5}
    made = Config(rank=1, alpha=1, targets="inputs", rank_by_pattern=ranks).build({"dit": dit})
    write_adapter(tmp_path / "a.safetensors", made.state())
    found = {path.removeprefix("dit."): layer.rank for path, layer in read_adapter(tmp_path / "a.safetensors").layers.items()}
    assert found == {
        "img_in": 4, "vector_in.in_layer": 2, "vector_in.out_layer": 2, "guidance_in.in_layer": 3, "guidance_in.out_layer": 3, "txt_in": 5,
    }  # fmt: skip
    assert {layer.parts[0].alpha for layer in made.state().layers.values()} == {1.0}  # the global alpha, whatever the rank


@pytest.mark.ledger("KS-32")
@pytest.mark.ledger("KS-34")
def test_ranks_by_type_and_block_lists_for_every_kind(dit: FluxDiT) -> None:
    for kind in (lokr, loha, oft):
        options = {"rank_by_type": {"txt_mlp": 0, "single": 8, "img_mod": 0}, "double_blocks": "1", "single_blocks": "0,2", "rank": 4}
        made = kind.Config(**options).build({"dit": dit})
        paths = set(made.adapters)
        assert not any(".0.img" in path or "txt_mlp" in path or "img_mod" in path or "single_blocks.1" in path for path in paths)
        assert {"dit.double_blocks.1.txt_mod.lin", "dit.single_blocks.2.linear1"} <= paths
        made.detach()


# ---- norm limit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [False, True])
def test_max_norm(dit: FluxDiT, split: bool) -> None:
    """Layers above the limit come down to it, split ones as the one layer of their file; the others keep every bit."""
    made = randomised(Config(rank=4, alpha=2, max_norm=3.0, split_qkv=split, targets="attention").build({"dit": dit}))
    with torch.no_grad():
        for name, param in made.params.items():
            if ".txt_attn." in name:
                param.mul_(1e-2)
    before = made.state({name: param.detach().clone() for name, param in made.params.items()})
    figures = made.after_step()
    above = {path for path, layer in before.layers.items() if (norm_of(layer) or 0) > 3}
    assert above
    for path, layer in made.state().layers.items():
        wanted = before.layers[path].delta() * min(1.0, 3 / (norm_of(before.layers[path]) or 1))
        assert torch.allclose(layer.delta(), wanted, atol=1e-5)
        if path not in above:
            assert torch.equal(layer.delta(), before.layers[path].delta())
    norms = [norm_of(layer) or 0 for layer in made.state().layers.values()]
    assert figures["keys_scaled"] == len(above)
    assert figures["max_key_norm"] == pytest.approx(max(norms), rel=1e-5)
    assert figures["avg_key_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-5)


# ---- split_qkv ------------------------------------------------------------------------------------------------------


@pytest.mark.ledger("KS-31")
@pytest.mark.parametrize("form", ["kohya", "peft", "comfy"])
def test_split_layers_load_at_the_trained_strength(dit: FluxDiT, form: str, tmp_path: Path) -> None:
    """Double and single blocks; a loader that only knows alpha / stored rank gets what was trained."""
    made = randomised(Config(rank=4, alpha=1, split_qkv=True, rank_by_pattern={":v$": 6}).build({"dit": dit}))
    linear1 = made.adapters["dit.single_blocks.0.linear1"]
    assert {short.split(".")[0] for short in linear1.tensors()} == {"q", "k", "v", "mlp"}
    deltas = {path: adapter.delta(made.bases[path].weight) for path, adapter in made.adapters.items()}
    write_adapter(tmp_path / "a.safetensors", made.state(), format=form, dtype=None)  # type: ignore[arg-type]
    made.detach()
    again = load_adapter(tmp_path / "a.safetensors", {"dit": dit})
    for path, delta in deltas.items():
        assert torch.allclose(again.adapters[path].delta(again.bases[path].weight), delta, atol=1e-4), path


@pytest.mark.ledger("KS-31")
def test_rank_dropout_of_split_layers(dit: FluxDiT) -> None:
    made = randomised(Config(rank=4, split_qkv=True, rank_dropout=0.5).build({"dit": dit}))
    base, x = made.bases[QKV].train(), torch.randn(3, 5, 64)
    assert not torch.equal(base(x), base(x))
    base.eval()
    assert torch.equal(base(x), base(x))


# ---- starting files -------------------------------------------------------------------------------------------------


def text_file(fixtures_root: Path) -> Path:
    return fixtures_root / "text-encoder-lora-tiny/kohya.safetensors"


@pytest.mark.ledger("KS-37")
def test_ranks_from_a_file_of_text_encoders(models: dict[str, nn.Module], fixtures_root: Path) -> None:
    path = text_file(fixtures_root)
    made = Config(init_from=path, rank_from_file=True, text_encoders=("clip_l", "t5xxl")).build(models)
    assert len(made.adapters) == 39
    assert {part.tensors()["down"].shape[0] for part in part_modules(made)} == {3}
    made.detach()
    with pytest.raises(
        ConfigError, match=r"kohya\.safetensors: it has layers of t5xxl, which are not adapted.*text_encoders = \[\"t5xxl\"\]"
    ):
        Config(init_from=path, rank_from_file=True, text_encoders=("clip_l",)).build(models)
    made = Config(init_from=path, rank_from_file=True, text_encoders=("clip_l",), init_unused="ignore").build(models)
    assert {name.split(".")[0] for name in made.adapters} == {"clip_l"}


def test_ranks_of_no_file(dit: FluxDiT) -> None:
    with pytest.raises(ConfigError, match="rank_from_file needs a file"):
        Config(rank_from_file=True).build({"dit": dit})


def test_unused_layers_of_a_starting_file(dit: FluxDiT, tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"
    made = randomised(Config(rank=3, targets="blocks").build({"dit": dit}))
    write_adapter(path, made.state(), dtype=None)
    wanted = made.params[f"{QKV}.up"].detach().clone()
    made.detach()
    with pytest.raises(ModelFileError, match=r"start\.safetensors: the adapter file has layers that have no place"):
        Config(rank=3, targets="attention", init_from=path).build({"dit": dit})
    made = Config(rank=3, targets="attention", init_from=path, init_unused="ignore").build({"dit": dit})
    assert torch.equal(made.params[f"{QKV}.up"], wanted)
    assert "dit.double_blocks.0.img_mlp.0" not in made.adapters


def test_a_starting_file_that_does_not_fit_is_named_with_the_layer(dit: FluxDiT, fixtures_root: Path) -> None:
    folder = fixtures_root / "flux-dev-lora-tiny"
    with pytest.raises(ModelFileError, match=r"lycoris_lokr\.safetensors: dit\.double_blocks.*another kind of adapter \(lokr"):
        Config(rank=3, init_from=folder / "lycoris_lokr.safetensors").build({"dit": dit})
    path = fixtures_root / "lora-encoder-tiny/lora_a_kohya.safetensors"
    with pytest.raises(ModelFileError, match=r"kohya\.safetensors: .* model of another size"):
        Config(rank_from_file=True, init_from=path).build({"dit": dit})
    with pytest.raises(ConfigError, match=r"bfl_control\.safetensors: it replaces whole parameters"):
        Config(rank_from_file=True, init_from=folder / "bfl_control.safetensors").build({"dit": dit})


@pytest.mark.parametrize(("kind", "name"), [(lokr, "lycoris_lokr"), (loha, "lycoris_loha"), (oft, "kohya_oft"), (lokr, "lycoris_dokr")])
def test_training_goes_on_from_files_of_every_kind(dit: FluxDiT, fixtures_root: Path, kind, name: str) -> None:
    path = fixtures_root / f"flux-dev-lora-tiny/{name}.safetensors"
    made = kind.Config(type=kind.__name__.rpartition(".")[2], init_from=path, rank_from_file=True).build({"dit": dit})
    state = read_adapter(path)
    assert made.state().layers.keys() == state.layers.keys()
    for layer, adapter in made.adapters.items():
        written = {part.name: part.tensors for part in state.layers[layer].parts}
        for short, param in adapter.tensors().items():
            part, _, tensor = short.rpartition(".")
            assert torch.equal(param, written[part][tensor])
            assert param.requires_grad


# ---- all kinds on text encoders -------------------------------------------------------------------------------------


@pytest.mark.ledger("KS-37")
@pytest.mark.parametrize("kind", ["lora", "lokr", "loha", "dora", "full", "ia3", "glora", "oft", "diag_oft"])
def test_text_encoders(models: dict[str, nn.Module], kind: str, tmp_path: Path) -> None:
    values = {"type": kind, "rank": 2, "text_encoders": ["clip_l", "t5xxl"], "targets": "attention", "exclude": [r"^dit\."]}
    made = realise(config_class("fluxsmith.adapters", kind).model_validate(values)).build(models)
    ids = torch.tensor([[49, 3, 5, 7, 2]])
    before = models["clip_l"](ids)
    with torch.no_grad():
        for param in made.params.values():
            param.add_(torch.randn(param.shape) * 0.2)
    wanted = models["clip_l"](ids)
    assert not torch.allclose(wanted, before, atol=1e-4)
    write_adapter(tmp_path / "a.safetensors", made.state(), dtype=None)
    made.detach()
    again = load_adapter(tmp_path / "a.safetensors", models)
    assert {path.split(".")[0] for path in again.adapters} == {"clip_l", "t5xxl"}
    assert torch.allclose(models["clip_l"](ids), wanted, atol=1e-5)
