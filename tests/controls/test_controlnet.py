"""ControlNets at inference: modes, masks, both layouts, a part of the schedule, other bases, and what is refused. Numbers: tests/parity."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from net_files import controlnet, controlnet_file
from PIL import Image
from small_dit import dit, tokens
from tiny_pipeline import latents, load

from fluxsmith.config.control import Ground
from fluxsmith.controls import processors
from fluxsmith.controls.base import Scene
from fluxsmith.controls.controlnet import Config, Control, Residual
from fluxsmith.controls.controlnet_condition import condition_of, kept, shaped, without
from fluxsmith.controls.span import Span
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.models.assembly import Models
from fluxsmith.models.stream import Window

Draw = Callable[..., Image.Image]
LEVELS = (1.0, 0.9, 0.6, 0.3, 0.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("nets")
    kinds: dict[str, dict[str, Any]] = {"union": {"modes": 10}, "inpaint": {"channels": 68}, "plain": {}, "xlabs": {"layout": "pixels"}}
    return {kind: str(controlnet_file(folder / f"{kind}.safetensors", **options)) for kind, options in kinds.items()}


@pytest.fixture(scope="module")
def pipeline(plain_model: Path, files: dict[str, str], picture: Draw, mask: Draw) -> Pipeline:
    """All four at once, switched off."""
    common = {"type": "controlnet", "image": picture(1), "scale": 0.0}
    extra = {"union": {"mode": "canny"}, "inpaint": {"mask": mask((0, 0, 32, 64))}}
    return load(plain_model, *({**common, "name": kind, "path": path, **extra.get(kind, {})} for kind, path in files.items()))


def drawn(pipeline: Pipeline, name: str, **options: Any) -> torch.Tensor:
    return latents(pipeline, controls={name: {"scale": 1.0, **options}})


def differ(*results: torch.Tensor) -> bool:
    return all((a - b).abs().max() > 1e-4 for number, a in enumerate(results) for b in results[:number])


@pytest.mark.ledger("DS-13")
def test_every_mode_of_a_union_network_is_another_picture(pipeline: Pipeline) -> None:
    names = ("canny", "tile", "depth", "blur", "pose", "gray", "low_quality")
    by_name = [drawn(pipeline, "union", mode=name) for name in names]
    assert differ(latents(pipeline), *by_name)
    assert torch.equal(by_name[4], drawn(pipeline, "union", mode=4))
    assert torch.equal(by_name[4], drawn(pipeline, "union", mode="openpose"))
    assert torch.equal(by_name[6], drawn(pipeline, "union", mode="lq"))


def test_the_processor_makes_the_condition_and_tells_the_mode(pipeline: Pipeline, picture: Draw) -> None:
    image = picture(1)
    grey = image.convert("L").convert("RGB")
    made = drawn(pipeline, "union", mode=None, processor="gray", image=image)
    assert torch.equal(made, drawn(pipeline, "union", mode="gray", image=grey))
    assert differ(made, drawn(pipeline, "union", mode="gray", image=image), drawn(pipeline, "union", mode="depth", processor="gray"))


@pytest.mark.ledger("DS-12")
def test_inpainting_sees_the_mask_and_nothing_below_it(pipeline: Pipeline, picture: Draw, mask: Draw) -> None:
    left, right = mask((0, 0, 32, 64)), mask((32, 0, 64, 64))
    assert differ(latents(pipeline), drawn(pipeline, "inpaint", mask=left), drawn(pipeline, "inpaint", mask=right))
    other = picture(1)
    other.paste((9, 9, 9), (0, 0, 32, 64))
    assert torch.equal(drawn(pipeline, "inpaint", mask=left, image=other), drawn(pipeline, "inpaint", mask=left))
    assert differ(drawn(pipeline, "inpaint", mask=right, image=other), drawn(pipeline, "inpaint", mask=right))


def test_a_mask_is_cropped_to_the_pictures_shape(mask: Draw) -> None:
    wide = mask((40, 0, 60, 20), 60, 20)
    assert shaped(wide, 64, 64).size == (20, 20)
    assert shaped(mask((0, 0, 8, 8), 16, 32), 64, 64).size == (16, 16)
    assert shaped(mask((0, 0, 8, 8), 16, 32), 32, 64).size == (16, 32)
    assert without(Image.new("RGB", (4, 4), (9, 9, 9)), mask((0, 0, 1, 2), 2, 2)).getpixel((0, 3)) == (0, 0, 0)
    assert kept(mask((0, 0, 1, 2), 2, 2), 2, 2).flatten().tolist() == [0, 1, 0, 1]


@pytest.mark.ledger("DS-14")
def test_plain_and_xlabs_networks_follow_picture_scale_and_span(pipeline: Pipeline, picture: Draw) -> None:
    off = latents(pipeline)
    for name in ("plain", "xlabs"):
        results = [
            drawn(pipeline, name, **options) for options in ({}, {"image": picture(2)}, {"scale": 0.5}, {"end": 0.0}, {"start": 1.0})
        ]
        assert differ(off, *results)


@pytest.mark.ledger("DS-14")
@pytest.mark.parametrize(
    ("start", "end", "steps"), [(0.0, 1.0, [0, 1, 2, 3]), (0.0, 0.5, [0, 1]), (0.3, 0.7, [1, 2]), (1.0, 1.0, [3]), (0.0, 0.0, [0])]
)
def test_a_span_is_told_by_the_level_of_the_schedule(start: float, end: float, steps: list[int]) -> None:
    span = Span(LEVELS, start, end)
    assert [step for step in range(4) if span.covers(LEVELS[step])] == steps
    assert [step for step in range(4) if span.covers(LEVELS[step] - 1e-8)] == steps


def test_levels_between_two_belong_to_the_step_they_are_in_and_a_single_step_is_the_last() -> None:
    assert Span(LEVELS, 0.0, 0.3).covers(0.95) is True
    assert Span(LEVELS, 0.0, 0.3).covers(0.7) is False
    assert Span(LEVELS, 0.0, 0.4).covers(0.7) is True
    assert Span(LEVELS, 0.9, 1.0).covers(0.0) is True
    assert Span((1.0, 0.0), 0.0, 0.9).covers(1.0) is False
    assert Span((1.0, 0.0), 0.5, 1.0).covers(1.0) is True
    assert Span().covers(0.5) is True


def test_several_at_once_add_up(pipeline: Pipeline) -> None:
    both = latents(pipeline, controls={"plain": {"scale": 1.0}, "xlabs": {"scale": 1.0}})
    assert differ(both, drawn(pipeline, "plain"), drawn(pipeline, "xlabs"))


def test_it_acts_in_both_branches(pipeline: Pipeline) -> None:
    guided = {"cfg": 2.0, "negative": "blue"}
    off, on = latents(pipeline, **guided), latents(pipeline, **guided, controls={"plain": {"scale": 1.0}})
    assert differ(off, on)
    assert pipeline.controls[2].name == "plain"


@pytest.mark.parametrize("extra", ["features", "tokens", "text"])
def test_what_other_controls_add_is_none_of_its_business(extra: str) -> None:
    base = dit()
    control = Control(controlnet(base=base.params), base.params, Config())
    residual = Residual(control, torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(3)))
    plain = tokens()
    more = {
        "features": plain._replace(img=torch.cat((plain.img, torch.ones(1, 4, 320)), dim=-1)),
        "tokens": plain._replace(img=plain.img.repeat(1, 2, 1), img_ids=plain.img_ids.repeat(1, 2, 1), n_target=4),
        "text": plain._replace(
            txt=torch.cat((torch.ones(1, 2, tiny_run.TEXT), plain.txt), 1), txt_ids=plain.txt_ids.repeat(1, 2, 1)[:, :5], n_prompt=3
        ),
    }[extra]
    empty = base.embed(plain)._replace(img=torch.zeros(1, 4 * (2 if extra == "tokens" else 1), base.params.hidden_size))
    expected = residual.hooks(plain)[0].after(0, empty._replace(img=empty.img[:, :4])).img
    found = residual.hooks(more)[0].after(0, empty).img
    assert torch.allclose(found[:, :4], expected, atol=1e-6)
    assert not found[:, 4:].any()


def test_windows_of_a_picture_with_a_mask_channel() -> None:
    base = dit()
    control = Control(controlnet(base=base.params, channels=68), base.params, Config())
    whole = Residual(control, torch.arange(17.0 * 32).view(1, 17, 4, 8), Span(LEVELS, 0.0, 0.4))
    part = whole.tile(Window(2, 4, 2, 4, 4, 8))
    assert isinstance(part, Residual)
    assert torch.equal(part.condition, whole.condition[..., 2:, 4:])
    assert part.at(1.0) is part
    assert part.at(0.3) is None


@pytest.mark.parametrize("features", [384, 196])
def test_it_follows_its_picture_beside_fill_and_flex(
    features: int, wide_model: Callable[[int], Path], files: dict[str, str], picture: Draw
) -> None:
    pipeline = load(wide_model(features), {"type": "controlnet", "path": files["plain"], "image": picture(1)})
    assert len(pipeline.controls) == 2
    off, one, other = (latents(pipeline, controls={"controlnet": given}) for given in ({"scale": 0.0}, {}, {"image": picture(2)}))
    assert differ(off, one, other)


def test_under_a_limit_a_learned_annotator_has_the_device_alone(
    files: dict[str, str], picture: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processors, "annotated", lambda name, image, weights, device: Image.new("RGB", image.size, (9, 9, 9)))
    seen: list[tuple[Any, ...]] = []
    scene = Scene(
        Models(), 16, 16, "", None, LEVELS, torch.device("cpu"), torch.float32, encode_text=lambda prompts: pytest.fail("no text"),
        encode=lambda pixels: pixels, work=lambda *nets: seen.append(nets),
    )  # fmt: skip
    for name in ("depth", "pose", "canny"):
        condition_of(Config(type="controlnet", image=picture(1), processor=name), controlnet(), scene)
    assert seen == [(), ()]


def problems(path: str, **options: Any) -> str:
    config = Config.model_validate({"type": "controlnet", "path": path, **options})
    return "\n".join(map(str, (*config.misfits(Ground()), *config.problems(Ground()))))


def test_what_is_refused_before_weights_are_read(
    files: dict[str, str], picture: Draw, mask: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(1)
    assert "union network and has no mode. Fix: set mode = " in problems(files["union"], image=image)
    assert "modes 0 to 9 (mode is 11)" in problems(files["union"], image=image, mode=11)
    assert "has no modes" in problems(files["plain"], image=image, mode="canny")
    assert "inpainting network and has no mask" in problems(files["inpaint"], image=image)
    assert "takes no mask" in problems(files["plain"], image=image, mask=mask((0, 0, 9, 9)))
    assert "would not lie over each other" in problems(files["inpaint"], image=image, mask=mask((0, 0, 9, 9), 64, 32))
    assert "has no condition picture" in problems(files["plain"])
    assert "starts at 0.8 and ends at 0.2" in problems(files["plain"], image=image, start=0.8, end=0.2)
    assert "no such file" in problems(str(tmp_path / "none.safetensors"), image=image)
    monkeypatch.setattr(processors, "is_missing", lambda: False)
    assert problems(files["union"], image=image, processor="openpose") == ""
    monkeypatch.setattr(processors, "is_missing", lambda: True)
    assert "the processor openpose needs controlnet_aux. Fix: pip install" in problems(files["union"], image=image, processor="openpose")
    assert "does not go with Chroma" in str([*Config(type="controlnet", path=files["plain"]).misfits(Ground(family="chroma"))][0])


def test_a_file_that_is_no_controlnet_is_named(plain_model: Path, picture: Draw) -> None:
    path = str(plain_model / "t5xxl.safetensors")
    assert "this is a T5-XXL text encoder" in problems(path, image=picture(1))
    with pytest.raises((ConfigError, ModelFileError), match="this is a T5-XXL text encoder"):
        load(plain_model, {"type": "controlnet", "path": path})


def test_a_network_of_another_transformer_is_refused(plain_model: Path, tmp_path: Path, picture: Draw) -> None:
    other = replace(tiny_run.flux_params(), context_in_dim=24)
    path = controlnet_file(tmp_path / "other.safetensors", base=other)
    with pytest.raises(ConfigError, match="made for 24 text features, the model has 16"):
        load(plain_model, {"type": "controlnet", "path": str(path), "image": picture(1)})
