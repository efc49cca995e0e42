"""The LoRA encoder: files of its naming, what it needs of a LoRA, its place in the text and in the branches. Numbers: tests/parity."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from lora_sets import block_layers, write_lora
from tiny_pipeline import latents, load
from torch import Tensor

from fluxsmith.adapters.formats.state import AdapterState, LayerState, lora_part
from fluxsmith.config.control import Ground
from fluxsmith.controls.lora_encoder import Config, Rows
from fluxsmith.controls.lora_encoder_model import LoraEncoder, LoraEncoderParams, encoded, load_lora_encoder
from fluxsmith.controls.text_rows import with_rows
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.generate.request import Request
from fluxsmith.io.identify import identify
from fluxsmith.io.keymaps import MAPS
from fluxsmith.io.safetensors import save_weights
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.stream import Tokens


def encoder(dit: FluxDiT) -> LoraEncoder:
    sizes = {MAPS["diffsynth"].layer(name)[0].replace(".", "___"): layer for name, layer in block_layers(dit).items()}  # type: ignore[index]
    params = LoraEncoderParams({name: (2, one.in_features, one.out_features) for name, one in sizes.items()}, tiny_run.TEXT, 1, 24, 1, 2)
    net, generator = LoraEncoder(params), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    return net


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tiny_run.write_model(tmp_path_factory.mktemp("model"))
    dit = tiny_run.random_dit()
    save_weights(folder / "encoder.safetensors", encoder(dit).state_dict())
    return {
        "model": folder,
        "encoder": folder / "encoder.safetensors",
        "a": write_lora(folder / "a.safetensors", dit),
        "a_peft": write_lora(folder / "a_peft.safetensors", dit, kind="peft"),
        "b": write_lora(folder / "b.safetensors", dit, seed=2),
        "part": write_lora(folder / "part.safetensors", dit, leave_out="single_blocks.0.modulation"),
    }


def section(files: Mapping[str, Path], *names: str, **options: Any) -> dict[str, Any]:
    return {"type": "lora_encoder", "path": str(files["encoder"]), "loras": [str(files[name]) for name in names], "heads": 2, **options}


def test_a_file_comes_back_and_every_format_gives_one_token(files: dict[str, Path]) -> None:
    assert identify(files["encoder"]).role == "lora_encoder"
    net = load_lora_encoder(files["encoder"], heads=2)
    token = encoded(net, files["a"])
    assert token.shape == (1, 1, tiny_run.TEXT)
    assert torch.allclose(encoded(net, files["a_peft"]), token, atol=1e-5)
    assert not torch.allclose(encoded(net, files["b"]), token, atol=0.02)


def test_a_lora_without_a_layer_is_refused_by_that_layers_name(files: dict[str, Path]) -> None:
    with pytest.raises(ModelFileError, match=r"1 of the 13 layers.*dit\.single_blocks\.0\.modulation\.lin"):
        encoded(load_lora_encoder(files["encoder"], heads=2), files["part"])


def test_a_lora_of_another_size_and_an_adapter_that_adds_nothing(files: dict[str, Path]) -> None:
    net = load_lora_encoder(files["encoder"], heads=2)
    path = "dit.double_blocks.0.img_attn.proj"
    wrong = LayerState((lora_part("", 0, 8, torch.ones(2, 8), torch.ones(8, 2), 1.0),), 8)
    with pytest.raises(ModelFileError, match="another size"):
        net.token(AdapterState(dict.fromkeys(net.paths.values(), wrong)))
    part = lora_part("", 0, 32, torch.ones(2, 32), torch.ones(32, 2), 1.0)
    decomposed = LayerState((part.having(tensors={**part.tensors, "magnitude": torch.ones(32, 1)}, rule="peft"),), 32)
    only = LoraEncoder(LoraEncoderParams({"blocks___0___attn___a_to_out": (2, 32, 32)}, 16, 1, 24, 1, 2))
    with pytest.raises(ModelFileError, match="cannot read dora"):
        only.token(AdapterState({path: decomposed}))


def test_heads_that_do_not_fit(files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="heads do not fit"):
        load_lora_encoder(files["encoder"])


def tokens(mask: Tensor | None = None, n_prompt: int = 0) -> Tokens:
    return Tokens(
        torch.ones(2, 4, 8),
        torch.ones(2, 4, 3),
        torch.ones(2, 3, 5),
        torch.ones(2, 3, 3),
        torch.ones(2, 5),
        torch.ones(2),
        mask=mask,
        n_prompt=n_prompt,
    )


def test_rows_come_behind_the_prompt_and_are_seen() -> None:
    made = Rows(torch.full((1, 2, 5), 7.0)).tokens(tokens(torch.zeros(2, 1, 1, 7, dtype=torch.bool), n_prompt=2))
    assert made.txt[:, 3:].eq(7).all()
    assert made.txt.shape == (2, 5, 5)
    assert made.txt_ids.shape == (2, 5, 3)
    assert not made.txt_ids[:, 3:].any()
    assert made.mask is not None
    assert made.mask[0, 0, 0].tolist() == [False] * 3 + [True] * 2 + [False] * 4
    assert made.n_prompt == 4
    plain = with_rows(tokens(), torch.zeros(1, 1, 5), torch.full((1, 1, 3), 9.0))
    assert plain.mask is None
    assert plain.n_prompt == 0
    assert plain.txt_ids[:, 3].eq(9).all()


def test_what_is_missing_is_told_before_anything_is_read(files: dict[str, Path]) -> None:
    assert "has no LoRA" in str(next(Config(type="lora_encoder", path="x").problems(Ground())))
    with pytest.raises(ConfigError, match="no such file"):
        load(files["model"], section(files)).generate(
            Request("a", width=64, height=64, steps=1, controls={"lora_encoder": {"loras": ["gone.safetensors"]}})
        )


@pytest.mark.ledger("DS-18")
def test_pictures(files: dict[str, Path]) -> None:
    """Each LoRA is one more token of the prompt; other LoRAs can be given for a picture."""
    pipeline, given = load(files["model"], section(files, "a", "b")), {"lora_encoder": {"loras": [str(files["a"])]}}
    both, one = latents(pipeline, cfg=2.0), latents(pipeline, cfg=2.0, controls=given)
    base = latents(load(files["model"]), cfg=2.0)
    assert (both - base).abs().max() > 1e-3
    assert (one - both).abs().max() > 1e-3


def test_the_negative_prompt_stays_as_it_is(files: dict[str, Path]) -> None:
    pipeline = load(files["model"], section(files, "a", "b"))
    request = pipeline.completed(Request("a", cfg=2.0))
    made = pipeline.controls[0].prepare(pipeline._scene(request, torch.tensor([1.0, 0.0]), None, (torch.device("cpu"), torch.float32)))
    text = tokens()._replace(txt=torch.ones(2, 3, tiny_run.TEXT))
    assert made.positive.tokens(text).txt.shape[1] == 5
    assert made.negative.tokens(text).txt.shape[1] == 3


def test_the_published_file_builds(manifests_root: Path) -> None:
    shapes = {name: tuple(shape) for name, shape in json.loads((manifests_root / "lora-encoder.json").read_text())["tensors"].items()}
    params = LoraEncoderParams.from_shapes(shapes)
    assert (params.width, params.heads, params.mlp_hidden, params.depth, len(params.layers)) == (4096, 32, 8192, 1, 304)
    with torch.device("meta"):
        net = LoraEncoder(params)
    assert {name: tuple(value.shape) for name, value in net.state_dict().items()} == shapes
