"""Step1X-Edit: its question to the language model, its family and files, its picture in branches and tiles. Numbers: tests/parity."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_qwen
import tiny_run
import torch
from PIL import Image
from tiny_pipeline import latents, model_section

from fluxsmith.config.control import Ground
from fluxsmith.config.load import load_config
from fluxsmith.controls.step1x import Config, Step1X
from fluxsmith.controls.step1x_model import Connector, ConnectorParams, load_connector
from fluxsmith.controls.step1x_prompt import DROPPED, INSTRUCTION, LENGTH, letter, pieces, question, states_of
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.io.safetensors import save_weights
from fluxsmith.models.qwen_input import QwenText
from fluxsmith.models.qwen_vl import load_qwen, load_qwen_text
from fluxsmith.models.stream import Tokens, Window

SIZES = ConnectorParams(tiny_qwen.HIDDEN, tiny_run.TEXT, 24, tiny_run.TEXT, 2, 2)


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 80, 3), dtype=np.uint8))


def connector() -> Connector:
    net, generator = Connector(SIZES), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, its transformer also with a connector and without guidance, and a language model."""
    folder = tiny_run.write_model(tmp_path_factory.mktemp("model"))
    tensors = {key: value for key, value in tiny_run.random_dit().state_dict().items() if not key.startswith("guidance_in.")}
    save_weights(folder / "step1x.safetensors", tensors | {f"connector.{key}": value for key, value in connector().state_dict().items()})
    tiny_qwen.write_qwen(folder / "qwen", texts=[INSTRUCTION])
    return folder


@pytest.fixture(scope="module")
def text(folder: Path) -> QwenText:
    return load_qwen_text(folder / "qwen")


def load(folder: Path, *controls: dict[str, Any], **model: Any) -> Pipeline:
    files = {"path": str(folder / "step1x.safetensors"), "qwen": str(folder / "qwen"), "ae": str(folder / "ae.safetensors")}
    return Pipeline.load({"type": "step1x", **files, **model}, controls=controls, device="cpu")


def edit(image: Image.Image | None = None, **options: Any) -> dict[str, Any]:
    return {"type": "step1x", "image": image or picture(), "heads": 2, **options}


def test_quoted_words_are_told_letter_by_letter(text: QwenText) -> None:
    assert pieces("plain words") == [("plain words", False)]
    assert pieces("write “ab” here") == [('write "', False), ("a", True), ("b", True), ('" here', False)]
    assert pieces("'x' and \"y z\"") == [('"', False), ("x", True), ('" and "', False), ("y", True), (" ", True), ("z", True), ('"', False)]
    assert pieces("don't let the dog's tail") == [("don't let the dog's tail", False)]
    assert pieces('a mark " alone') == [('a mark " alone', False)]
    assert letter("q", text) == text.ids("“q”")[1:-1]


def test_the_question(text: QwenText) -> None:
    """The instruction, the picture, the prompt; the part before the picture's end does not depend on the prompt."""
    plain, quoted = question("make it red", text), question('write "ab" on it', text)
    end = plain.index(text.end)
    assert quoted[: end + 1] == plain[: end + 1]
    assert text.tokenizer.decode(plain[end + 1 :]) == "make it red<|im_end|>\n<|im_start|>assistant\n"
    assert sum(one == text.image for one in plain) == 1
    assert text.ids('write "ab" on it') != quoted[end + 1 :][: len(text.ids('write "ab" on it'))]
    head = str(text.tokenizer.decode(plain[: end + 1]))
    assert head.endswith("User Prompt:Picture 1: <|vision_start|><|image_pad|><|vision_end|>")
    assert "You are a helpful assistant." in head


def test_states_are_cut_and_filled_up(folder: Path, text: QwenText) -> None:
    model = load_qwen(folder / "qwen")
    states, mask = states_of("make it red", picture(), model, text)
    inputs = text.read(question("make it red", text), [picture()])
    assert states.shape == (1, LENGTH, tiny_qwen.HIDDEN)
    assert mask.shape == (1, LENGTH)
    count = int(mask.sum())
    assert states[:, count:].eq(0).all()
    assert states[:, :count].ne(0).any(dim=-1).all()
    assert count < LENGTH
    assert inputs.ids.shape[1] > DROPPED
    other, _ = states_of("make it blue", picture(), model, text)
    assert torch.equal(other[:, :10], states[:, :10])  # what comes before the prompt does not know it
    assert not torch.allclose(other[:, count - 1], states[:, count - 1])


@pytest.mark.ledger("DS-20")
def test_pictures(folder: Path) -> None:
    """The prompt, the negative prompt and the picture all change what is drawn."""
    pipeline = load(folder, edit())
    base = latents(pipeline, cfg=2.0)
    assert (latents(pipeline, cfg=2.0, prompt="a blue square") - base).abs().max() > 1e-4
    assert (latents(pipeline, cfg=2.0, negative="a blue square") - base).abs().max() > 1e-4
    assert (latents(pipeline, cfg=2.0, controls={"step1x": {"image": picture(1)}}) - base).abs().max() > 1e-3


def tokens(n: int = 4) -> Tokens:
    ids = torch.arange(n * 3).view(1, n, 3).float()
    return Tokens(
        torch.ones(2, n, 64),
        ids.expand(2, -1, -1),
        torch.ones(2, 3, tiny_run.TEXT),
        torch.zeros(2, 3, 3),
        torch.ones(2, tiny_run.TEXT),
        torch.tensor([0.2, 0.9]),
    )


def test_text_and_picture_in_a_batch() -> None:
    """The text is made anew at each noise level; the picture's tokens have the places of the target's; tiles take their part."""
    generator = torch.Generator().manual_seed(1)
    states, shown = torch.randn(1, 5, tiny_qwen.HIDDEN, generator=generator), torch.tensor([[True, True, True, False, False]])
    control = Step1X(connector(), states, shown, torch.randn(1, 16, 4, 4, generator=generator))
    made = control.tokens(tokens())
    assert made.txt.shape == (2, 5, tiny_run.TEXT)
    assert (made.txt[0] - made.txt[1]).abs().max() > 1e-3
    assert torch.equal(made.y[0], made.y[1])
    assert (made.img.shape[1], made.n_target) == (8, 4)
    assert torch.equal(made.img_ids[:, 4:], made.img_ids[:, :4])
    padded = Step1X(connector(), states * torch.tensor([1, 1, 1, 9, 9])[:, None], shown, control.latents).tokens(tokens())
    assert torch.allclose(padded.txt[:, :3], made.txt[:, :3], atol=1e-6)
    assert torch.allclose(padded.y, made.y)
    tile = control.tile(Window(2, 0, 2, 4, 4, 4))
    assert isinstance(tile, Step1X)
    assert torch.equal(tile.latents, control.latents[:, :, 2:])


def test_what_is_missing_is_told_before_weights_are_read(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)needs Qwen2\.5-VL.*set model\.qwen"):
        load(folder, qwen="")
    with pytest.raises(ConfigError, match="no picture to change"):
        latents(load(folder, {"type": "step1x", "heads": 2}))
    section = model_section(folder)
    with pytest.raises(ConfigError, match=r'(?s)model\.type is flux1.*write model\.type = "step1x"'):
        Pipeline.load({**section, "path": str(folder / "step1x.safetensors")}, device="cpu")
    with pytest.raises(ConfigError, match=r'(?s)model\.type is step1x.*write model\.type = "flux1"'):
        load(folder, edit(), path=section["path"])
    with pytest.raises(ConfigError, match="needs Step1X-Edit's transformer"):
        Pipeline.load(model_section(folder), controls=[edit()], device="cpu")
    with pytest.raises(ModelFileError, match="connector"):
        load_connector(folder / "dit.safetensors")
    with pytest.raises(ConfigError, match="heads do not fit"):
        load_connector(folder / "step1x.safetensors")
    assert "no picture" in str(next(Config(type="step1x").problems(Ground())))


def test_the_family_always_has_its_control(folder: Path) -> None:
    """Given or not, it takes its files from the model section; a file of its own wins."""
    given = load(folder, edit(dtype="bf16"))
    assert [control.name for control in given.controls] == ["step1x"]
    assert given.controls[0].config.path == str(folder / "step1x.safetensors")
    assert next(given.controls[0].nets[1].parameters()).dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="heads do not fit"):  # it is there, but the tiny one's heads cannot be guessed
        load(folder)


@pytest.mark.parametrize("kind", ["step1x", "nexus_gen"])
def test_training_is_refused_in_a_runs_config(kind: str, folder: Path) -> None:
    plain = {"model": {"type": kind}, "adapter": {"type": "lora"}, "data": [{"type": "folder", "path": str(folder)}], "train": {"steps": 1}}
    with pytest.raises(ConfigError) as raised:
        load_config({**plain, "run": {"dir": "runs"}, "checkpoint": {"every": 1}, "optim": {"type": "torch", "name": "adamw", "lr": 1e-4}})
    assert f"{kind} is for drawing; it cannot be trained yet" in str(raised.value)
