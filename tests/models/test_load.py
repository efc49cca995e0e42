"""Files -> modules: the same model from every layout, a wrong or incomplete file named before anything is allocated, 16 and 8 bit files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run
import torch
from streams import tokens
from torch import Tensor, nn

from fluxsmith.errors import ModelFileError
from fluxsmith.io.keymaps import MAPS
from fluxsmith.io.keymaps.apply import disassemble
from fluxsmith.io.safetensors import open_weights, save_weights
from fluxsmith.models import fill
from fluxsmith.models.load import load_ae, load_clip_l, load_dit, load_t5xxl

LOADERS: dict[str, Callable[..., nn.Module]] = {"dit": load_dit, "clip_l": load_clip_l, "t5xxl": load_t5xxl, "ae": load_ae}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


def tensors_of(path: Path) -> dict[str, Tensor]:
    with open_weights(path) as weights:
        return {key: weights.tensor(key) for key in weights}


def diffusers_tensors(bfl: dict[str, Tensor]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for key, value in bfl.items():
        recipe = MAPS["diffusers"].recipe(key)
        assert recipe is not None, key
        made |= disassemble(recipe, value, tiny_run.HIDDEN)
    return {key: value.contiguous() for key, value in made.items()}


def write_shards(folder: Path, tensors: dict[str, Tensor], stem: str, count: int = 3) -> Path:
    """Shards with an index, as transformers and diffusers write them; returns the index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    files = {f"{stem}-{place + 1:05d}-of-{count:05d}.safetensors": names[place::count] for place in range(count)}
    for file, keys in files.items():
        save_weights(folder / file, {key: tensors[key] for key in keys})
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {key: file for file, keys in files.items() for key in keys}}))
    return index


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@torch.no_grad()
@pytest.mark.ledger("KS-01")
@pytest.mark.ledger("ST-04")
def test_transformer_from_every_layout(model: Path, tmp_path: Path) -> None:
    """One BFL file, shards, an index, a diffusers folder (whole and sharded), and with the prefix of an all-in-one file."""
    bfl = tensors_of(model / "dit.safetensors")
    theirs = diffusers_tensors(bfl)
    assert len(theirs) > len(bfl)
    write_shards(tmp_path / "shards", bfl, "flux")
    index = write_shards(tmp_path / "transformer", theirs, "diffusion_pytorch_model")
    (tmp_path / "whole").mkdir()
    save_weights(tmp_path / "whole" / "diffusion_pytorch_model.safetensors", theirs)
    save_weights(tmp_path / "prefixed.safetensors", {f"model.diffusion_model.{key}": value for key, value in bfl.items()})
    expected = load_dit(model / "dit.safetensors")
    assert not any(param.requires_grad for param in expected.parameters())
    assert not expected.training
    paths = [
        tmp_path / "shards" / "flux-00002-of-00003.safetensors",
        tmp_path / "shards",
        index,
        tmp_path / "transformer",
        tmp_path / "whole",
        tmp_path / "prefixed.safetensors",
    ]
    for path in paths:
        loaded = load_dit(path)
        assert same(loaded, expected), path
        assert torch.equal(loaded(tokens()), tiny_run.random_dit().requires_grad_(False)(tokens()))


@pytest.mark.ledger("KS-01")
@pytest.mark.ledger("KS-03")
@pytest.mark.ledger("KS-04")
@pytest.mark.ledger("KS-05")
def test_all_parts_from_one_checkpoint(model: Path, tmp_path: Path, fixtures_root: Path) -> None:
    prefixes = {
        "dit": "model.diffusion_model.",
        "clip_l": "text_encoders.clip_l.transformer.",
        "t5xxl": "text_encoders.t5xxl.transformer.",
        "ae": "vae.",
    }
    files = {role: model / f"{role}.safetensors" for role in prefixes} | {"ae": fixtures_root / "ae-tiny" / "weights.safetensors"}
    metadata = {"fluxsmith.model": open_weights(model / "clip_l.safetensors").metadata["fluxsmith.model"]}
    whole = {prefix + key: value for role, prefix in prefixes.items() for key, value in tensors_of(files[role]).items()}
    save_weights(tmp_path / "all.safetensors", whole, metadata)
    for role, load in LOADERS.items():
        assert same(load(tmp_path / "all.safetensors"), load(files[role])), role


@pytest.mark.parametrize("role", LOADERS)
@pytest.mark.parametrize(("stored", "name"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float8_e4m3fn, "fp8")])
@pytest.mark.ledger("KS-04")
def test_files_of_fewer_bits(model: Path, tmp_path: Path, role: str, stored: torch.dtype, name: str) -> None:
    """What is used is exactly what is stored, in the type that is asked for."""
    source = model / f"{role}.safetensors"
    path = tmp_path / f"{role}_{name}.safetensors"
    save_weights(path, {key: value.to(stored) for key, value in tensors_of(source).items()}, open_weights(source).metadata)
    for used in (torch.float32, torch.bfloat16):
        loaded, whole = LOADERS[role](path, dtype=used), LOADERS[role](source)
        params = dict(whole.named_parameters())
        for key, param in loaded.named_parameters():
            assert param.dtype == used
            assert torch.equal(param, params[key].to(stored).to(used)), key


@torch.no_grad()
@pytest.mark.ledger("KS-04")
def test_fp8_encoder_works_close_to_the_whole_one(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "t5xxl_fp8_e4m3fn.safetensors"
    save_weights(path, {key: value.to(torch.float8_e4m3fn) for key, value in tensors_of(model / "t5xxl.safetensors").items()})
    ids = torch.arange(12).view(1, 12)
    whole, coarse = load_t5xxl(model / "t5xxl.safetensors")(ids), load_t5xxl(path)(ids)
    assert coarse.isfinite().all()
    assert 0 < (coarse - whole).abs().mean() < 0.15 * whole.std()


@pytest.mark.parametrize("role", LOADERS)
def test_wrong_role_is_named(model: Path, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a single tensor is read."""
    monkeypatch.setattr("fluxsmith.io.safetensors.WeightsFile.tensor", lambda *args, **options: pytest.fail("a tensor was read"))
    titles = {"dit": "transformer", "clip_l": "CLIP-L", "t5xxl": "T5", "ae": "autoencoder"}
    for other, title in titles.items():
        if other != role:
            with pytest.raises(ModelFileError) as caught:
                LOADERS[role](model / f"{other}.safetensors")
            assert title in str(caught.value)
            assert f"{other}.safetensors" in str(caught.value)
            assert caught.value.exit_code == 4


@pytest.mark.parametrize("role", LOADERS)
def test_missing_and_misshapen_tensors_are_named(model: Path, tmp_path: Path, role: str) -> None:
    tensors = tensors_of(model / f"{role}.safetensors")
    metadata = open_weights(model / f"{role}.safetensors").metadata
    name = next(key for key in sorted(tensors) if key.endswith(("mlp.0.bias", "fc2.bias", "layer_norm.weight", "conv.2.bias")))
    path = tmp_path / f"{role}.safetensors"
    save_weights(path, {key: value for key, value in tensors.items() if key != name}, metadata)
    with pytest.raises(ModelFileError) as missing:
        LOADERS[role](path)
    assert name.split(".", 1)[1] in str(missing.value.lines())
    save_weights(path, tensors | {name: tensors[name][:-1]}, metadata)
    with pytest.raises(ModelFileError) as misshapen:
        LOADERS[role](path)
    text = " ".join(misshapen.value.lines())
    assert name.split(".", 1)[1] in text
    assert str((tensors[name].shape[0] - 1,)) in text


def test_all_findings_come_at_once() -> None:
    expected = {f"layer{place}.weight": (2, 2) for place in range(8)} | {"a": (1,), "b": (3,)}
    found = {"layer0.weight": (2, 2), "a": (2,), "b": (3,), "x": (1,)}
    with pytest.raises(ModelFileError) as caught:
        fill.check_keys(expected, found, "model.safetensors")
    lines = caught.value.lines()
    assert len(lines) == 3
    assert "7 tensors missing: layer1.weight" in lines[0]
    assert "..." in lines[0]
    assert "1 tensors unexpected: x" in lines[1]
    assert "a (2,) instead of (1,)" in lines[2]


def test_nothing_may_stay_without_memory() -> None:
    module = fill.meta(lambda: nn.Linear(2, 2))
    with pytest.raises(ModelFileError, match="2 tensors were not given a value"):
        fill.finish(module)


def test_broken_description_in_the_metadata(model: Path, tmp_path: Path) -> None:
    save_weights(tmp_path / "clip_l.safetensors", tensors_of(model / "clip_l.safetensors"), {"fluxsmith.model": "{not json"})
    with pytest.raises(ModelFileError, match="metadata"):
        load_clip_l(tmp_path / "clip_l.safetensors")


def test_heads_from_a_config_beside_the_file(model: Path, tmp_path: Path) -> None:
    tensors = tensors_of(model / "clip_l.safetensors")
    save_weights(tmp_path / "clip_l.safetensors", tensors)
    with pytest.raises(ModelFileError, match=r"config\.json"):
        load_clip_l(tmp_path / "clip_l.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2, "architectures": ["Anything"], "auto_map": {"x": "y"}}))
    assert load_clip_l(tmp_path / "clip_l.safetensors").params.num_heads == 2
