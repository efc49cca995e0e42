"""Kontext: references of any size have an effect, where they are, and what is refused. Numbers: tests/parity."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_dit import dit, tokens
from tiny_pipeline import latents, load

from fluxsmith.config.control import Ground
from fluxsmith.controls.kontext import Config, Kontext, positions
from fluxsmith.errors import ConfigError
from fluxsmith.models.stream import Window

Draw = Callable[..., Image.Image]


@pytest.mark.ledger("DS-11")
def test_every_reference_has_an_effect_whatever_its_size(plain_model: Path, picture: Draw) -> None:
    pipeline = load(plain_model, {"type": "kontext", "images": [picture(1)]})
    one = latents(pipeline)
    assert torch.equal(one, latents(pipeline))
    assert one.shape == (1, 16, 8, 8)
    seen = [one, latents(load(plain_model))]
    for images in ([picture(2)], [picture(1), picture(2, 90, 37)], [picture(1, 32, 64)]):
        seen.append(latents(pipeline, controls={"kontext": {"images": images}}))
    assert all((a - b).abs().max() > 1e-4 for number, a in enumerate(seen) for b in seen[:number])


def test_both_branches_see_the_references(plain_model: Path, picture: Draw) -> None:
    pipeline = load(plain_model, {"type": "kontext", "images": [picture(1)]})
    same = {"prompt": "a red circle", "negative": "a red circle"}
    assert torch.allclose(latents(pipeline, cfg=3.0, **same), latents(pipeline), atol=1e-5)


def test_the_transformer_predicts_the_picture_alone() -> None:
    made = Kontext.of([torch.ones(1, 16, 4, 2)]).tokens(tokens()._replace(mask=torch.ones(1, 1, 1, 7, dtype=torch.bool)))
    assert (made.n_target, made.img.shape[1], made.img_ids.shape[1]) == (4, 6, 6)
    assert made.mask is not None
    assert made.mask.shape == (1, 1, 1, 9)
    assert dit()(made).shape == (1, 4, 64)


def test_a_batch_shares_its_references() -> None:
    three = tokens()
    three = three._replace(img=three.img.expand(3, -1, -1), img_ids=three.img_ids.expand(3, -1, -1))
    assert Kontext.of([torch.ones(1, 16, 4, 2)]).tokens(three).img.shape == (3, 6, 64)


def test_positions_of_several_references() -> None:
    sizes = [(4, 8), (8, 4), (4, 4)]
    overlap, index, offset = (positions(sizes, name)[0] for name in ("overlap", "index", "offset"))
    first = 8
    assert overlap[:, 0].unique().tolist() == [1]
    assert overlap[first].tolist() == [1, 0, 0]
    assert index[:, 0].unique().tolist() == [1, 2, 3]
    assert torch.equal(index[:, 1:], overlap[:, 1:])
    assert len({tuple(row) for row in offset.tolist()}) == len(offset)
    assert len({tuple(row) for row in overlap.tolist()}) < len(offset)
    assert offset[first].tolist() == [1, 2, 0]  # below the first, which is wide


def test_the_placement_has_an_effect(plain_model: Path, picture: Draw) -> None:
    pipeline = load(plain_model, {"type": "kontext", "images": [picture(1), picture(2)]})
    made = [latents(pipeline, controls={"kontext": {"placement": name}}) for name in ("overlap", "index", "offset")]
    assert all((a - b).abs().max() > 1e-5 for a, b in ((made[0], made[1]), (made[0], made[2]), (made[1], made[2])))


def test_large_references_can_be_scaled_down(plain_model: Path, picture: Draw) -> None:
    pipeline = load(plain_model, {"type": "kontext", "images": [picture(1, 128, 64)]})
    assert pipeline.controls[0].added_tokens == 32
    small = pipeline.controls[0].given(max_pixels=32 * 64)
    assert small.added_tokens == 8
    assert (latents(pipeline) - latents(pipeline, controls={"kontext": {"max_pixels": 2048}})).abs().max() > 1e-4


def test_a_window_sees_whole_references() -> None:
    made = Kontext.of([torch.ones(1, 16, 4, 2)])
    assert made.tile(Window(0, 0, 2, 2, 4, 4)) is made


def test_what_is_refused(tmp_path: Path) -> None:
    assert [str(one) for one in Config(type="kontext").problems(Ground())] == ["control kontext has no picture. Fix: give it images"]
    (gone,) = Config(type="kontext", images=(str(tmp_path / "gone.png"),)).problems(Ground())
    assert "gone.png" in str(gone)
    (wide,) = Config(type="kontext").misfits(Ground(in_channels=384))
    assert "384 features a token, a reference has 64" in str(wide)
    assert not list(Config(type="kontext").misfits(Ground()))


def test_it_is_refused_before_weights_are_read(wide_model: Callable[[int], Path], picture: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxsmith.generate.pipeline.LazyModels.get", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match="kontext does not go with this transformer"):
        load(wide_model(384), {"type": "kontext", "images": [picture(1)]})
