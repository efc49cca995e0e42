"""Flex.2: every input has an effect, the control picture stops when it shall, and what is refused. Numbers: tests/parity."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from tiny_pipeline import latents, load

from fluxsmith.config.control import Ground
from fluxsmith.controls.flex2 import Config, Flex, cover_to, last_level
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.models.stream import Window

Draw = Callable[..., Image.Image]


@pytest.fixture(scope="module")
def flex(wide_model: Callable[[int], Path]) -> Pipeline:
    return load(wide_model(196))


@pytest.mark.ledger("DS-21")
def test_every_input_has_an_effect(flex: Pipeline, picture: Draw, mask: Draw) -> None:
    left = mask((0, 0, 32, 64))
    seen = [latents(flex)]
    for options in (
        {"control_image": picture(1)},
        {"control_image": picture(2)},
        {"control_image": picture(1), "strength": 0.9},
        {"control_image": picture(1), "stop": 1.0},
        {"image": picture(1), "mask": left},
        {"image": picture(1), "mask": left, "control_image": picture(1)},
    ):
        seen.append(latents(flex, steps=3, controls={"flex2": options}))
    assert all((a - b).abs().max() > 1e-4 for number, a in enumerate(seen) for b in seen[:number])


def test_a_picture_under_a_white_mask_is_not_seen(flex: Pipeline, picture: Draw, mask: Draw) -> None:
    everything = {"image": picture(1), "mask": mask((0, 0, 64, 64))}
    assert torch.allclose(latents(flex, controls={"flex2": everything}), latents(flex), atol=1e-6)


def test_the_control_picture_stops() -> None:
    levels = (1.0, 0.75, 0.5, 0.25, 0.0)
    assert [last_level(levels, stop) for stop in (0.0, 0.25, 0.5, 0.9, 1.0)] == [1.0, 1.0, 0.75, 0.5, 0.25]
    ones = torch.ones(1, 16, 2, 2)
    made = Flex.of(ones, ones[:, :1] * 0.25, 2 * ones, 0.5)
    assert made.at(0.5) is made
    assert made.condition[0, :, 0, 0].tolist() == [0.75] * 16 + [0.25] + [2.0] * 16
    assert made.at(0.25).condition[0, :, 0, 0].tolist() == [0.75] * 16 + [0.25] + [0.0] * 16


def test_a_window_sees_its_part() -> None:
    whole = Flex(torch.arange(33 * 32.0).view(1, 33, 4, 8), 0.5)
    part = whole.tile(Window(2, 4, 2, 4, 4, 8))
    assert torch.equal(part.condition, whole.condition[..., 2:4, 4:8])
    assert part.last == 0.5


def test_a_mask_of_another_shape_is_cropped_as_its_picture(mask: Draw) -> None:
    for cells, box, width, height in (((4, 4), (16, 0, 80, 64), 96, 64), ((8, 4), (0, 16, 96, 64), 96, 80)):
        whole = mask((20, 20, 60, 60), width, height)
        differences = ImageChops.difference(cover_to(whole, cells), whole.crop(box).resize(cells)).getextrema()
        assert max(high for _, high in differences) < 30  # the filter looks a little beyond the crop


def test_what_is_refused(picture: Draw) -> None:
    (problem,) = Config(type="flex2", mask=picture(1)).problems(Ground())
    assert "a mask but no image" in str(problem)
    (problem,) = Config(type="flex2", mask=picture(1, 32, 64), image=picture(1)).problems(Ground())
    assert "32 x 64" in str(problem)
    with pytest.raises(ValueError, match="less than or equal to 1"):
        Config(type="flex2", stop=2.0)
