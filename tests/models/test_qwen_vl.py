"""Qwen2.5-VL: patches and positions as the library makes them, files of both layouts, states that know the picture and the text."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_qwen
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from fluxsmith.errors import ModelFileError
from fluxsmith.io.safetensors import save_weights
from fluxsmith.models.fill import meta, shapes_of
from fluxsmith.models.qwen_input import PICTURE, Pixels, QwenText, bounded, fitting, patches_of, positions, tokens_of, turn
from fluxsmith.models.qwen_vl import QwenParams, QwenVL, find_qwen_tokenizer, load_qwen, load_qwen_text, memory_key


def picture(width: int = 60, height: int = 84, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen.write_qwen(tmp_path_factory.mktemp("qwen"), texts=["a red circle and a blue square"])


@pytest.fixture(scope="module")
def text(folder: Path) -> QwenText:
    return load_qwen_text(find_qwen_tokenizer(folder / "model.safetensors"))


@pytest.mark.parametrize("size", [(60, 84), (30, 200), (1000, 700), (640, 640)])
def test_patches_are_the_librarys(size: tuple[int, int]) -> None:
    limits = Pixels(4 * 28 * 28, 324 * 28 * 28)
    library = Qwen2VLImageProcessorPil(min_pixels=limits.least, max_pixels=limits.most)
    expected = library(images=[picture(*size)], return_tensors="pt")
    patches, grid = patches_of(bounded(picture(*size), limits))
    assert expected["image_grid_thw"].tolist() == [[1, *grid]]
    assert torch.allclose(patches, expected["pixel_values"], atol=1e-5)


def test_sizes_are_multiples_within_the_limits() -> None:
    limits = Pixels(256 * 28 * 28, 324 * 28 * 28)
    for size in ((512, 512), (100, 100), (3000, 200), (1024, 1536)):
        width, height = fitting(*size, limits)
        assert width % 28 == height % 28 == 0
        assert width * height <= limits.most
    assert fitting(1024, 1024, limits) == (504, 504)
    assert fitting(10, 10, Pixels()) == (56, 56)


def test_positions_are_the_librarys(text: QwenText) -> None:
    ids = text.ids(f"a {PICTURE}{PICTURE} red {PICTURE} circle")
    inputs = text.read(ids, [picture(), picture(112, 56), picture(84, 84)])
    is_image = inputs.ids == text.image
    grids = torch.tensor([(1, *grid) for grid in inputs.grids])
    expected, _ = tiny_qwen.random_qwen().model.get_rope_index(inputs.ids, is_image.int(), grids)
    assert torch.equal(positions(is_image, inputs.grids), expected)
    assert int(is_image.sum()) == sum(map(tokens_of, inputs.grids))


def test_pictures_that_touch_are_told_apart() -> None:
    made = positions(torch.tensor([[False, True, True, True, False]]), [(2, 4), (2, 2)])
    assert made[:, 0].tolist() == [[0, 1, 1, 3, 4], [0, 1, 1, 3, 4], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("layout", ["published", "new"])
def test_files_of_both_layouts(layout: str, folder: Path, tmp_path: Path) -> None:
    net = tiny_qwen.random_qwen()
    path = folder / "model.safetensors"
    if layout == "new":
        path = tmp_path / "model.safetensors"
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        save_weights(path, {**net.state_dict(), "lm_head.weight": torch.zeros(2, 2)})
    made = load_qwen(path)
    assert made.params == net.params
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in net.state_dict().items())


@torch.no_grad()
def test_states_know_the_picture_and_the_text(folder: Path, text: QwenText) -> None:
    net, built = load_qwen(folder), tiny_qwen.random_qwen()

    def run(words: str, image: Image.Image) -> torch.Tensor:
        return net(text.read(text.ids(turn("user", f"{PICTURE}{words}")), [image]), text.image)

    first = run("a red circle", picture())
    assert first.shape == (1, first.shape[1], tiny_qwen.HIDDEN)
    inputs = text.read(text.ids(turn("user", f"{PICTURE}a red circle")), [picture()])
    assert torch.allclose(first, built(inputs, text.image), atol=1e-5)  # the tables are as in a model built with memory
    assert not torch.allclose(run("a blue square", picture())[:, -1], first[:, -1], atol=0.05)
    assert not torch.allclose(run("a red circle", picture(seed=1))[:, -1], first[:, -1], atol=0.01)


@torch.no_grad()
def test_the_librarys_own_forward(folder: Path, text: QwenText) -> None:
    net = load_qwen(folder)
    inputs = text.read(text.ids(turn("user", f"{PICTURE}a red circle")), [picture()])
    net.model.config.image_token_id = text.image
    grids = torch.tensor([(1, *grid) for grid in inputs.grids])
    kinds = (inputs.ids == text.image).int()
    expected = net.model(input_ids=inputs.ids, pixel_values=inputs.patches, image_grid_thw=grids, mm_token_type_ids=kinds)
    assert torch.allclose(net(inputs, text.image), expected.last_hidden_state, atol=1e-5)


def test_wrong_files(folder: Path, tmp_path: Path) -> None:
    tensors = {tiny_qwen.file_key(key): value for key, value in tiny_qwen.random_qwen().state_dict().items()}
    del tensors["model.norm.weight"]
    save_weights(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ModelFileError, match="do not fit the model"):
        load_qwen(tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match="no tokenizer for the language model"):
        find_qwen_tokenizer(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"config\.json cannot be read"):
        load_qwen(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b-instruct", "nexus-gen-v2-ar"])
def test_the_published_files_build(name: str, manifests_root: Path) -> None:
    listed = json.loads((manifests_root / f"{name}.json").read_text())["tensors"]
    shapes = {memory_key(key): tuple(shape) for key, shape in listed.items() if key != "lm_head.weight"}
    params = QwenParams.from_shapes(shapes)
    assert (params.heads, params.kv_heads, params.layers, params.sections) == (28, 4, 28, (16, 24, 24))
    assert (params.vision_heads, params.whole_layers) == (16, (7, 15, 23, 31))
    assert shapes_of(meta(lambda: QwenVL(params))) == shapes
