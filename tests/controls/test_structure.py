"""Canny and Depth: the control picture has an effect, in a model made for it and in FLUX.1-dev with BFL's control LoRA."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run
import torch
from PIL import Image
from tiny_pipeline import latents, load, model_section

from fluxsmith.config.control import Ground
from fluxsmith.config.load import load_control, load_model
from fluxsmith.controls.processors import processed
from fluxsmith.controls.structure import Config, Structure
from fluxsmith.errors import ConfigError
from fluxsmith.generate.controls import check_early
from fluxsmith.generate.request import Request
from fluxsmith.io.safetensors import save_weights
from fluxsmith.models.stream import Window

Draw = Callable[..., Image.Image]


@pytest.fixture(scope="module")
def control_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In BFL's form: the input layer takes the control picture too."""
    generator = torch.Generator().manual_seed(0)
    width, made = tiny_run.HIDDEN, {}
    for layer, inputs, outputs in (("img_in", 128, width), ("double_blocks.0.img_attn.proj", width, width)):
        made[f"{layer}.lora_A.weight"] = torch.randn(4, inputs, generator=generator)
        made[f"{layer}.lora_B.weight"] = torch.randn(outputs, 4, generator=generator) * 0.1
        made[f"{layer}.lora_B.bias"] = torch.randn(outputs, generator=generator) * 0.1
    path = tmp_path_factory.mktemp("control-lora") / "depth.safetensors"
    save_weights(path, made)
    return path


def test_the_control_picture_has_an_effect(wide_model: Callable[[int], Path], picture: Draw) -> None:
    pipeline = load(wide_model(128), {"type": "structure", "image": picture(1)})
    made = latents(pipeline)
    assert (made - latents(pipeline, controls={"structure": {"image": picture(2)}})).abs().max() > 1e-4
    assert (made - latents(pipeline, control_image=picture(2))).abs().max() > 1e-4
    with pytest.raises(ConfigError, match="has no picture"):
        latents(pipeline, controls={"structure": {"image": None}})
    with pytest.raises(ConfigError, match="needs a canny or depth picture"):
        load(wide_model(128))


def test_edges_can_be_made_of_a_photograph(wide_model: Callable[[int], Path], picture: Draw) -> None:
    pipeline = load(wide_model(128), {"type": "structure", "image": picture(1)})
    ready = {"structure": {"image": processed("canny", picture(1), thresholds=(50, 100))}}
    made = {"structure": {"processor": "canny", "thresholds": (50, 100)}}
    assert torch.equal(latents(pipeline, controls=ready), latents(pipeline, controls=made))
    assert (latents(pipeline, controls=made) - latents(pipeline)).abs().max() > 1e-4
    for option, fix in (({"processor": "cany"}, 'write "canny"'), ({"imag": picture(2)}, "is not an option")):
        with pytest.raises(ConfigError, match=rf"(?s)control\.{next(iter(option))}.*{fix}"):
            latents(pipeline, controls={"structure": option})


def test_a_control_lora_makes_it_of_a_plain_transformer(plain_model: Path, control_lora: Path, picture: Draw) -> None:
    pipeline = load(plain_model, {"type": "structure", "image": picture(1)})
    with pytest.raises(ConfigError, match=r"64 features a token, not 128.*its control LoRA"):
        latents(pipeline)
    pipeline.load_lora(control_lora)
    made = latents(pipeline)
    assert (made - latents(pipeline, controls={"structure": {"image": picture(2)}})).abs().max() > 1e-4
    pipeline.clear_loras()
    with pytest.raises(ConfigError, match="its control LoRA"):
        latents(pipeline)
    plain = load(plain_model)
    before = latents(plain)
    plain.load_lora(control_lora)
    with pytest.raises(ConfigError, match="needs a canny or depth picture"):
        latents(plain)
    plain.clear_loras()
    assert torch.equal(latents(plain), before)


def test_that_is_known_before_weights_are_read(plain_model: Path, control_lora: Path, picture: Draw) -> None:
    model, request = load_model({"model": model_section(plain_model)}), [Request("x", width=64, height=64)]
    entry = load_control({"type": "structure", "image": picture(1)})
    check_early(model, [entry], request, loras=[(control_lora, 0.8)])
    check_early(model, [], request)
    for controls, loras in (([entry], ()), ([entry], [(control_lora, 0.0)])):
        with pytest.raises(ConfigError, match="its control LoRA"):
            check_early(model, controls, request, loras=loras)
    with pytest.raises(ConfigError, match="needs a canny or depth picture"):
        check_early(model, [], request, loras=[(control_lora, 1.0)])


def test_a_window_sees_its_part() -> None:
    whole = Structure(torch.arange(16 * 32.0).view(1, 16, 4, 8))
    assert torch.equal(whole.tile(Window(2, 4, 2, 4, 4, 8)).latents, whole.latents[..., 2:4, 4:8])


def test_a_missing_file_is_told() -> None:
    assert "gone.png" in str(next(Config(type="structure", image="gone.png").problems(Ground())))
