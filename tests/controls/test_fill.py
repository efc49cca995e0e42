"""Fill: picture and mask have an effect, a model of it works without them, and what is refused. Numbers: tests/parity."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_dit import tokens
from tiny_pipeline import latents, load

from fluxsmith.config.control import Ground
from fluxsmith.controls.fill import Config, Filled, cells, empty, hole
from fluxsmith.controls.pictures import pixels
from fluxsmith.errors import ConfigError
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.models.stream import Window

Draw = Callable[..., Image.Image]


@pytest.fixture(scope="module")
def fill(wide_model: Callable[[int], Path]) -> Pipeline:
    """The control is implied by the transformer."""
    return load(wide_model(384))


def with_options(pipeline: Pipeline, options: Mapping[str, Any], **changes: Any) -> torch.Tensor:
    return latents(pipeline, controls={"fill": options}, **changes)


@pytest.mark.ledger("DS-36")
def test_picture_and_mask_have_an_effect(fill: Pipeline, picture: Draw, mask: Draw) -> None:
    left, right = mask((0, 0, 32, 64)), mask((32, 0, 64, 64))
    seen = [latents(fill)]
    for options in ({"image": picture(1), "mask": left}, {"image": picture(2), "mask": left}, {"image": picture(1), "mask": right}):
        seen.append(with_options(fill, options))
    assert all((a - b).abs().max() > 1e-4 for number, a in enumerate(seen) for b in seen[:number])


def test_under_the_mask_the_picture_is_not_seen(fill: Pipeline, picture: Draw, mask: Draw) -> None:
    other = picture(1)
    other.paste((9, 9, 9), (0, 0, 32, 64))
    hidden = {"mask": mask((0, 0, 32, 64))}
    assert torch.equal(with_options(fill, {"image": picture(1), **hidden}), with_options(fill, {"image": other, **hidden}))


def test_the_transparent_part_is_the_mask(fill: Pipeline, picture: Draw, mask: Draw) -> None:
    cut = picture(1)
    cut.putalpha(mask((0, 0, 64, 64)).convert("L"))
    cut.paste((9, 9, 9, 0), (0, 0, 32, 64))
    assert torch.equal(with_options(fill, {"image": cut}), with_options(fill, {"image": picture(1), "mask": mask((0, 0, 32, 64))}))


def test_pictures_of_another_shape_are_cropped_or_stretched(fill: Pipeline, picture: Draw, mask: Draw) -> None:
    options = {"image": picture(1, 96, 64), "mask": mask((0, 0, 30, 64), 96, 64)}
    middle = {"image": picture(1, 96, 64).crop((16, 0, 80, 64)), "mask": mask((0, 0, 14, 64))}
    assert torch.allclose(with_options(fill, options), with_options(fill, middle), atol=1e-4)
    assert (with_options(fill, options) - with_options(fill, {**options, "fit": "stretch"})).abs().max() > 1e-4


def test_the_pixels_of_a_cell_are_its_mask_channels() -> None:
    holes = torch.zeros(1, 1, 16, 24)
    holes[0, 0, 8 + 3, 16 + 5] = 1
    made = cells(holes)
    assert made.shape == (1, 64, 2, 3)
    assert made.nonzero().tolist() == [[0, 3 * 8 + 5, 1, 2]]


def test_grey_counts_from_the_middle_on() -> None:
    grey = Image.new("L", (3, 1))
    for column, value in enumerate((127, 128, 255)):
        grey.putpixel((column, 0), value)
    assert hole(grey).flatten().tolist() == [0, 1, 1]
    assert pixels(grey).shape == (1, 3, 1, 3)


def test_a_window_sees_its_part() -> None:
    whole = Filled(torch.arange(80 * 32.0).view(1, 80, 4, 8))
    part = whole.tile(Window(2, 4, 2, 4, 4, 8))
    assert torch.equal(part.condition, whole.condition[..., 2:4, 4:8])
    assert Filled(empty(32, 32)).tokens(tokens()).img.shape == (1, 4, 384)


def test_tiles_are_drawn(fill: Pipeline, picture: Draw, mask: Draw) -> None:
    options = {"image": picture(1, 96, 64), "mask": mask((0, 0, 48, 64), 96, 64)}
    made = with_options(fill, options, width=96, denoise_tile=64)
    assert made.shape == (1, 16, 8, 12)
    assert (made - with_options(fill, {**options, "image": picture(2, 96, 64)}, width=96, denoise_tile=64)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": "mask"}, "a mask but no image"),
        ({"image": "image"}, "has no mask"),
        ({"image": "image", "mask": "tall"}, "the mask is 32 x 64, the image 64 x 64"),
        ({"image": "gone.png", "mask": "mask"}, "gone.png"),
    ],
)
def test_what_is_refused(options: dict[str, str], words: str, picture: Draw, mask: Draw) -> None:
    given = {"mask": mask((0, 0, 9, 9)), "image": picture(1), "tall": picture(1, 32, 64)}
    config = Config(type="fill", **{key: given.get(name, name) for key, name in options.items()})
    assert any(words in str(problem) for problem in config.problems(Ground()))


def test_an_enlarged_mask_is_taken_and_another_transformer_is_not(plain_model: Path, picture: Draw, mask: Draw) -> None:
    config = Config(type="fill", image=picture(1, 64, 48), mask=mask((0, 0, 9, 9), 127, 96))
    assert not list(config.problems(Ground()))
    with pytest.raises(ConfigError, match="control fill needs a transformer made for it"):
        load(plain_model, {"type": "fill"})
