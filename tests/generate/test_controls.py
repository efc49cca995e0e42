"""Controls around a picture: names, overrides of a request, tiles of a picture, the limit, and what is refused early."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fluxsmith.config.control import Ground
from fluxsmith.config.load import load_control
from fluxsmith.controls.controlnet_model import file_tensors, from_base
from fluxsmith.errors import ConfigError
from fluxsmith.generate.controls import check, check_early, implied, named
from fluxsmith.generate.job import Job, draw_all
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.generate.request import Request
from fluxsmith.generate.tiles import in_tiles, windows
from fluxsmith.io.safetensors import save_weights
from fluxsmith.models.stream import Window
from fluxsmith.models.tiling import Tiling

SMALL = {"width": 32, "height": 32, "steps": 2}


def picture(seed: int, side: int = 32) -> Image.Image:
    return Image.fromarray(torch.randint(256, (side, side, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8).numpy())


@pytest.fixture(scope="module")
def controlnet(loaded: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet of the tiny model that changes what is drawn."""
    assert loaded.models.dit is not None
    generator = torch.Generator().manual_seed(0)
    net = from_base(loaded.models.dit, layout="latents", double_blocks=1, single_blocks=0, generator=generator)
    with torch.no_grad():
        for param in net.parameters():
            if not param.any():
                param.normal_(0, 0.3, generator=generator)
    path = tmp_path_factory.mktemp("control") / "net.safetensors"
    save_weights(path, file_tensors(net, net.state_dict()), {})
    return path


@pytest.fixture(scope="module")
def controlled(tiny_section: dict[str, str], controlnet: Path) -> Pipeline:
    """Two entries of one file."""
    entries = [{"type": "controlnet", "path": str(controlnet), "image": picture(1)} for _ in range(2)]
    return Pipeline.load(tiny_section, controls=entries, device="cpu")


def latents(pipeline: Pipeline, **changes: Any) -> Tensor:
    with torch.no_grad():
        return pipeline.latents(pipeline.completed(Request("a red circle", **{**SMALL, **changes})))


def test_entries_without_a_name_are_numbered_and_share_their_file(controlled: Pipeline) -> None:
    assert [control.name for control in controlled.controls] == ["controlnet", "controlnet-2"]
    assert controlled.controls[0].nets[0] is controlled.controls[1].nets[0]


def test_a_request_gives_options_of_its_own(controlled: Pipeline) -> None:
    base = latents(controlled)
    assert torch.equal(base, latents(controlled))
    other = latents(controlled, controls={"controlnet-2": {"image": picture(2)}})
    assert (base - other).abs().max() > 1e-4
    off = latents(controlled, controls={"controlnet": {"scale": 0.0}, "controlnet-2": {"scale": 0.0}})
    halves = latents(controlled, controls={"controlnet": {"scale": 2.0}, "controlnet-2": {"scale": 0.0}})
    assert (off - base).abs().max() > 1e-4
    assert torch.allclose(halves, base, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"nobody": {"scale": 0.5}}, "no control is called nobody.*controlnet, controlnet-2"),
        ({"controlnet": {"path": "x"}}, "fixed when the model is loaded"),
        ({"controlnet": {"image": None}}, "no condition picture"),
    ],
)
def test_what_a_request_cannot_give(controlled: Pipeline, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        latents(controlled, controls=given)


def test_under_a_limit_the_same_picture(controlled: Pipeline, tiny_section: dict[str, str], controlnet: Path) -> None:
    entries = [{"type": "controlnet", "path": str(controlnet), "image": picture(1)} for _ in range(2)]
    limited = Pipeline.load(tiny_section, controls=entries, device="cpu", vram_limit=0.0)
    assert torch.equal(latents(limited), latents(controlled))
    assert limited.residency is not None
    assert limited.residency.components.working == {"dit", "control 0"}
    assert limited.residency.plan.streamed.keys() >= {"dit", "control 0"}


def test_windows_cover_every_cell_and_fade_into_each_other() -> None:
    parts = list(windows(10, 14, Tiling(64, 32), 8))
    assert {(part.height, part.width) for part in parts} == {(8, 8)}
    seen = torch.zeros(10, 14)
    for part in parts:
        seen[part.top : part.top + part.height, part.left : part.left + part.width] += 1
    assert seen.min() >= 1
    x = torch.randn(1, 16, 10, 14)
    assert torch.allclose(in_tiles(x, parts, [], 4, lambda part, _: 2 * part), 2 * x, atol=1e-6)


def test_denoising_in_one_window_is_denoising_as_a_whole(controlled: Pipeline) -> None:
    assert torch.allclose(latents(controlled, denoise_tile=64), latents(controlled), atol=1e-5)
    tiled = latents(controlled, width=64, denoise_tile=32)
    assert tiled.shape == (1, 16, 4, 8)
    assert tiled.isfinite().all()
    changed = latents(controlled, width=64, denoise_tile=32, controls={"controlnet": {"image": picture(2, 64)}})
    assert (changed - tiled).abs().max() > 1e-4


def test_the_condition_of_a_window_is_its_part(controlled: Pipeline) -> None:
    from fluxsmith.controls.controlnet import Control, Residual

    control = controlled.controls[0]
    assert isinstance(control, Control)
    whole = Residual(control, torch.arange(32.0).view(1, 1, 4, 8))
    part = whole.tile(Window(2, 4, 2, 4, 4, 8))
    assert isinstance(part, Residual)
    assert part.condition.flatten().tolist() == [20, 21, 22, 23, 28, 29, 30, 31]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"denoise_tile": 32, "cache": {"type": "teacache", "threshold": 0.4}}, "step cache with denoise_tile"),
        ({"denoise_tile": 32, "denoise_overlap": 24}, "advance by 16"),
        ({"denoise_overlap": 24}, "without denoise_tile"),
    ],
)
def test_windows_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Request("x", **options).check()


def test_two_controls_of_one_name() -> None:
    entry = load_control({"type": "controlnet", "name": "pose", "image": picture(1)})
    with pytest.raises(ConfigError, match="two controls are called pose"):
        check([entry, entry], Ground())
    assert [one.name for one in named([entry])] == ["pose"]


def test_a_transformer_with_more_features_has_a_control_of_its_own() -> None:
    assert (implied([], 384), implied([], 196), implied([], 64)) == ("fill", "flex2", "")
    with pytest.raises(ConfigError, match="needs a canny or depth picture"):
        check([], Ground(in_channels=128))


def test_the_job_refuses_before_weights_are_read(
    tiny_section: dict[str, str], controlnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fluxsmith.config.load import load_model

    entry = load_control({"type": "controlnet", "path": str(controlnet)})
    with pytest.raises(ConfigError, match="no condition picture"):
        check_early(load_model({"model": tiny_section}), [entry], [Request("x", **SMALL)])
    job = Job(load_model({"model": tiny_section}), ("x",), (0,), SMALL, controls=(entry,), place={"device": "cpu"}, out=tmp_path / "a.png")
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match="no condition picture"):
        list(draw_all(job))


def test_what_drew_it_is_written_into_the_picture(tiny_section: dict[str, str], controlnet: Path, tmp_path: Path) -> None:
    from fluxsmith.config.load import load_model

    source = tmp_path / "condition.png"
    picture(1).save(source)
    entry = load_control({"type": "controlnet", "path": str(controlnet), "image": str(source), "scale": 0.5})
    job = Job(load_model({"model": tiny_section}), ("x",), (0,), SMALL, controls=(entry,), place={"device": "cpu"}, out=tmp_path / "a.png")
    (record,) = draw_all(job)
    (written,) = record["control_models"]
    assert (written["type"], written["scale"], written["image"]) == ("controlnet", 0.5, str(source))
    with Image.open(tmp_path / "a.png") as made:
        assert "condition.png" in str(made.info)
