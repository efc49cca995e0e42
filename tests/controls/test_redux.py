"""Redux: pictures have an effect with and without the prompt, in which branch, and what is refused. Numbers: tests/parity."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from PIL import Image
from tiny_pipeline import latents, load

from fluxsmith.config.control import Ground
from fluxsmith.controls.redux import Config
from fluxsmith.controls.redux_model import ReduxEmbedder, load_redux
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.io.safetensors import save_weights
from fluxsmith.models.vision_encoders import ROOT, SiglipVision, VisionParams

Draw = Callable[..., Image.Image]
WIDTH = 64


def write_redux(path: Path, width: int = tiny_run.TEXT) -> str:
    net, generator = ReduxEmbedder(WIDTH, 24, width), torch.Generator().manual_seed(0)
    save_weights(path, {name: torch.randn(value.shape, generator=generator) * 0.2 for name, value in net.state_dict().items()})
    return str(path)


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("redux")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        siglip = SiglipVision(VisionParams(WIDTH, 48, 1, 1, 32, 16))
    save_weights(folder / "siglip.safetensors", {ROOT + key: value.contiguous() for key, value in siglip.model.state_dict().items()})
    return {"type": "redux", "path": write_redux(folder / "redux.safetensors"), "encoder": str(folder / "siglip.safetensors")}


@pytest.fixture(scope="module")
def redux(plain_model: Path, section: dict[str, Any], picture: Draw) -> Pipeline:
    return load(plain_model, {**section, "images": [picture(1)]})


@pytest.mark.ledger("DS-36")
def test_pictures_and_their_weight_have_an_effect(redux: Pipeline, plain_model: Path, picture: Draw) -> None:
    seen = [latents(redux), latents(load(plain_model))]
    for options in ({"images": [picture(2)]}, {"images": [picture(1), picture(2)]}, {"scale": 0.5}):
        seen.append(latents(redux, controls={"redux": options}))
    assert all((a - b).abs().max() > 1e-4 for number, a in enumerate(seen) for b in seen[:number])
    assert redux.controls[0].added_tokens == 4


def test_without_the_prompt_no_prompt_has_an_effect(redux: Pipeline) -> None:
    promptless = {"controls": {"redux": {"keep_prompt": False}}}
    assert torch.equal(latents(redux, **promptless), latents(redux, prompt="a large blue square", **promptless))
    assert (latents(redux) - latents(redux, prompt="a large blue square")).abs().max() > 1e-4
    assert (latents(redux) - latents(redux, **promptless)).abs().max() > 1e-4


def test_the_negative_branch_sees_the_pictures_where_it_shall(redux: Pipeline) -> None:
    same = {"cfg": 3.0, "negative": "a red circle"}
    both = latents(redux, controls={"redux": {"on_negative": True}}, **same)
    assert torch.allclose(both, latents(redux), atol=1e-5)
    assert (latents(redux, **same) - both).abs().max() > 1e-4


def test_under_a_limit_the_same_picture(redux: Pipeline, plain_model: Path, section: dict[str, Any], picture: Draw) -> None:
    from tiny_pipeline import model_section

    limited = Pipeline.load(model_section(plain_model), controls=[{**section, "images": [picture(1)]}], device="cpu", vram_limit=0.0)
    assert torch.equal(latents(limited), latents(redux))


def test_what_is_refused(plain_model: Path, section: dict[str, Any], tmp_path: Path) -> None:
    assert len(list(Config(type="redux").misfits(Ground()))) == 2
    assert "has no picture" in str(next(Config(type="redux").problems(Ground())))
    with pytest.raises(ConfigError, match="has no encoder"):
        load(plain_model, {"type": "redux", "path": section["path"]})
    with pytest.raises(ModelFileError, match="its tokens are 24 wide, the model's text 16"):
        load(plain_model, {**section, "path": write_redux(tmp_path / "wide.safetensors", 24)})
    with pytest.raises(ModelFileError, match="image_embedder was expected"):
        load(plain_model, {**section, "path": section["encoder"]})
    save_weights(tmp_path / "half.safetensors", {"redux_up.weight": torch.ones(4, 8)})
    with pytest.raises(ModelFileError, match="the image embedder lacks"):
        load_redux(tmp_path / "half.safetensors")
