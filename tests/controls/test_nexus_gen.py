"""Nexus-Gen: its conversation, states read in one forward, drawing and editing decoders, branches and tiles. Numbers: tests/parity."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_qwen
import tiny_run
import torch
from PIL import Image
from tiny_pipeline import latents, model_section
from torch import nn

from fluxsmith.controls.nexus_gen import Thought
from fluxsmith.controls.nexus_gen_model import Adapter, Merger, MergerParams, editing_ids, load_adapter, load_merger
from fluxsmith.controls.nexus_gen_states import DRAWN, EDITED, conversation, wish
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.io.keymaps.diffsynth import NEXUS_GEN
from fluxsmith.io.safetensors import save_weights
from fluxsmith.models.fill import meta, shapes_of
from fluxsmith.models.qwen_input import PICTURE, QwenText, positions
from fluxsmith.models.qwen_vl import QwenVL, load_qwen, load_qwen_text
from fluxsmith.models.stream import Tokens, Window

SIZES = MergerParams(tiny_qwen.HIDDEN, 24, 1, 2, 1, 40, tiny_run.TEXT, (2, 3, 3))
COUNT = 81


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (84, 56, 3), dtype=np.uint8))


def drawn(net: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(value.shape, generator=generator) * 0.3 for key, value in net.state_dict().items()}


def decoder_tensors() -> dict[str, torch.Tensor]:
    """The tiny transformer in the decoders' naming, whose final modulation has its halves the other way round."""
    made = {}
    for key, value in tiny_run.random_dit().state_dict().items():
        recipe = NEXUS_GEN.recipe(key)
        assert recipe is not None
        (name,) = recipe.keys
        made[f"pipe.dit.{name}"] = torch.cat(value.chunk(2)[::-1]) if key.startswith("final_layer.adaLN") else value
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, dit = tiny_run.write_model(tmp_path_factory.mktemp("model")), decoder_tensors()
    adapter, merger = drawn(Adapter(tiny_qwen.HIDDEN, tiny_run.TEXT)), drawn(Merger(SIZES))
    save_weights(folder / "generation.safetensors", dit | {f"adapter.{key}": value for key, value in adapter.items()})
    save_weights(folder / "edit.safetensors", dit | {f"embedding_merger.{key}": value for key, value in merger.items()})
    tiny_qwen.write_qwen(folder / "language", prefill=COUNT, texts=[DRAWN, EDITED])
    return folder


@pytest.fixture(scope="module")
def text(folder: Path) -> QwenText:
    return load_qwen_text(folder / "language")


def load(folder: Path, decoder: str, *controls: dict[str, Any], **model: Any) -> Pipeline:
    files = {**model_section(folder), "path": str(folder / f"{decoder}.safetensors"), "language_model": str(folder / "language")}
    section = {**files, "type": "nexus_gen", "preset": "generation", "text_dtype": "fp32", **model}
    return Pipeline.load(section, controls=controls, device="cpu")


def test_the_conversation() -> None:
    drawing, editing = conversation("a red circle", edits=False), conversation("make it red", edits=True)
    assert drawing.endswith(f"<|im_start|>user\na red circle<|im_end|>\n<|im_start|>assistant\n{DRAWN}{PICTURE}<|im_end|>\n")
    assert editing.endswith(f"<|im_start|>user\n{PICTURE} make it red<|im_end|>\n<|im_start|>assistant\n{EDITED}{PICTURE}<|im_end|>\n")
    assert conversation("put <image> on a wall", edits=True).count(f"put {PICTURE} on a wall") == 1
    assert conversation("<image> a cat <image>", edits=False).count(PICTURE) == 1
    assert conversation("<image> and <image>", edits=True).count(PICTURE) == 2


@torch.no_grad()
def test_states_come_one_place_before_the_learned_inputs(folder: Path, text: QwenText) -> None:
    model = load_qwen(folder / "language")
    made = wish("a red circle", None, model, text)
    assert made.target.shape == (1, COUNT, tiny_qwen.HIDDEN)
    assert (made.target_grid, made.reference.shape[1], made.reference_grid) == ((18, 18), 0, None)
    inputs = text.read(text.ids(conversation("a red circle", edits=False)), [Image.new("RGB", (252, 252))])
    is_image = inputs.ids == text.image
    rows = model.model.language_model.embed_tokens(inputs.ids)
    rows[is_image] = model.image_prefill_embeds.weight
    states = model.vision_head(model.states(rows, positions(is_image, inputs.grids)))
    first = int(is_image[0].int().argmax())
    assert torch.equal(made.target, states[:, first - 1 : first - 1 + COUNT])
    assert not torch.allclose(wish("a blue square", None, model, text).target, made.target, atol=0.01)


@torch.no_grad()
def test_a_reference_is_seen_and_thought_about(folder: Path, text: QwenText) -> None:
    model = load_qwen(folder / "language")
    first, second = (wish("make it red", picture(seed), model, text) for seed in (0, 1))
    assert first.reference_grid == (6, 4)
    assert first.reference.shape[1] == 6
    assert not torch.allclose(first.reference, second.reference, atol=0.01)
    assert not torch.allclose(first.target, second.target, atol=1e-3)
    with pytest.raises(ModelFileError, match=r"(?s)not Nexus-Gen's.*0 learned inputs"):
        wish("a", None, tiny_qwen.random_qwen(), text)
    with pytest.raises(ConfigError, match=r"prompt has <\|image_pad\|>"):
        wish("a <|image_pad|>", None, model, text)


@pytest.mark.ledger("DS-22")
def test_drawing(folder: Path) -> None:
    """The positive branch is the language model's; the negative prompt is read by the text encoders."""
    pipeline = load(folder, "generation")
    base = latents(pipeline, cfg=2.0)
    assert (latents(pipeline, cfg=2.0, prompt="a blue square") - base).abs().max() > 1e-3
    assert (latents(pipeline, cfg=2.0, negative="a blue square") - base).abs().max() > 1e-4
    plain = Pipeline.load(model_section(folder), device="cpu")
    assert (latents(plain, cfg=2.0) - base).abs().max() > 1e-3
    assert (pipeline.models.dit.final_layer.adaLN_modulation[1].weight == plain.models.dit.final_layer.adaLN_modulation[1].weight).all()  # type: ignore[union-attr, index]  # loaded
    with pytest.raises(ConfigError, match="draws from the prompt alone"):
        latents(pipeline, controls={"nexus_gen": {"image": picture()}})


@pytest.mark.ledger("DS-22")
def test_editing(folder: Path) -> None:
    pipeline = load(folder, "edit", {"type": "nexus_gen", "heads": 2, "image": picture()})
    base = latents(pipeline)
    assert (latents(pipeline, prompt="a blue square") - base).abs().max() > 1e-4
    assert (latents(pipeline, controls={"nexus_gen": {"image": picture(1)}}) - base).abs().max() > 1e-4


def test_rows_take_the_place_of_the_text_and_move_with_tiles() -> None:
    tokens = Tokens(torch.ones(2, 4, 64), torch.zeros(2, 4, 3), torch.ones(2, 3, 5), torch.zeros(2, 3, 3), torch.ones(2, 5), torch.ones(2))
    ids = editing_ids(((4, 4), (4, 8)), (8, 8))
    assert ids[0, :4].tolist() == [[0, 0, 0], [0, 0, 2], [0, 2, 0], [0, 2, 2]]
    assert ids[0, 4:6].tolist() == [[1, 0, 0], [1, 0, 1]]
    made = Thought(torch.full((1, 12, 5), 2.0), ids).tokens(tokens)
    assert made.txt.shape == (2, 12, 5)
    assert made.txt.eq(2).all()
    assert torch.equal(made.txt_ids[1], ids[0])
    assert torch.equal(made.y, tokens.y)
    window = Window(4, 2, 4, 4, 8, 8)
    moved = Thought(torch.ones(1, 12, 5), ids).tile(window)
    assert isinstance(moved, Thought)
    assert moved.ids is not None
    assert moved.ids[0, 3].tolist() == [0, 0, 1]
    still = Thought(torch.ones(1, 12, 5))
    assert still.tile(window) is still


def test_what_is_missing_is_told_before_weights_are_read(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)needs its language model.*set model\.language_model"):
        load(folder, "generation", language_model="")
    with pytest.raises(ConfigError, match=r"(?s)a decoder of Nexus-Gen was expected"):
        load(folder, "dit")
    with pytest.raises(ConfigError, match="no picture to change"):
        latents(load(folder, "edit", {"type": "nexus_gen", "heads": 2}))
    with pytest.raises(ConfigError, match="heads do not fit"):
        load_merger(folder / "edit.safetensors")
    with pytest.raises(ModelFileError):
        load_adapter(folder / "edit.safetensors")


def test_the_published_decoders_build(manifests_root: Path) -> None:
    def part(name: str, prefix: str) -> dict[str, tuple[int, ...]]:
        listed = json.loads((manifests_root / f"nexus-gen-v2-{name}.json").read_text())["tensors"]
        return {key.removeprefix(prefix): tuple(shape) for key, shape in listed.items() if key.startswith(prefix)}

    expected = part("edit-decoder", "embedding_merger.")
    params = MergerParams.from_shapes(expected)
    assert (params.heads, params.kv_heads, params.sections) == (28, 4, (16, 24, 24))
    assert shapes_of(meta(lambda: Merger(params))) == expected
    expected = part("generation-decoder", "adapter.")
    assert shapes_of(meta(lambda: Adapter(3584, 4096))) == expected


def test_the_language_model_keeps_its_head_and_learned_inputs(folder: Path) -> None:
    net = load_qwen(folder / "language")
    assert isinstance(net, QwenVL)
    assert net.params.prefill == COUNT
    assert torch.equal(net.vision_head.weight, tiny_qwen.random_qwen(COUNT).vision_head.weight)
