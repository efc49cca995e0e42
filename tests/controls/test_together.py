"""Controls beside each other: every pair that makes sense acts as both, many at once do too, and pairs that do not go are refused."""

from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from control_files import PLAIN, entries_for, lora_for
from PIL import Image
from tiny_pipeline import latents, load
from torch import Tensor

from fluxsmith.config.control import Ground
from fluxsmith.config.load import load_control
from fluxsmith.controls.base import Control
from fluxsmith.errors import ConfigError
from fluxsmith.generate.controls import check
from fluxsmith.generate.pipeline import Pipeline

Draw = Callable[..., Image.Image]
SMALL = {"width": 32, "height": 32, "steps": 2}
FEATURES = {"fill": 384, "flex2": 196, "structure": 128}
EFFECT = 1e-5  # latents are of size 1; a control that is lost changes nothing at all


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, picture: Draw, mask: Draw) -> dict[str, dict[str, Any]]:
    return entries_for(tmp_path_factory.mktemp("controls"), picture, mask)


@pytest.fixture(scope="module")
def everything(plain_model: Path, files: dict[str, dict[str, Any]]) -> tuple[Pipeline, dict[str, Control]]:
    """One pipeline with every control that goes with plain FLUX.1-dev."""
    pipeline = load(plain_model, *(files[name] for name in PLAIN))
    return pipeline, {control.name: control for control in pipeline.controls}


@pytest.fixture
def drawn(everything: tuple[Pipeline, dict[str, Control]]) -> Iterator[Callable[..., Tensor]]:
    """`drawn("kontext", "redux")`: latents with these controls alone."""
    pipeline, controls = everything
    known: dict[tuple[str, ...], Tensor] = {}

    def draw(*names: str, **options: Any) -> Tensor:
        pipeline.controls = [controls[name] for name in names]
        if options:
            return latents(pipeline, **{**SMALL, **options})
        if names not in known:
            known[names] = latents(pipeline, **SMALL)
        return known[names]

    yield draw
    pipeline.controls = list(controls.values())
    pipeline.clear_loras()


@pytest.mark.parametrize("pair", list(combinations(PLAIN, 2)), ids="+".join)
def test_two_at_once_act_as_both(drawn: Callable[..., Tensor], pair: tuple[str, str]) -> None:
    both = drawn(*pair)
    assert both.isfinite().all()
    for one in (drawn(pair[0]), drawn(pair[1]), drawn()):
        assert (both - one).abs().max() > EFFECT
    assert torch.allclose(drawn(*reversed(pair)), both, atol=1e-4)


def test_what_others_add_is_not_silenced_with_the_prompt(drawn: Callable[..., Tensor]) -> None:
    promptless = {"controls": {"redux": {"keep_prompt": False}}}
    for first, second in (("value", "redux"), ("redux", "value")):
        both = drawn(first, second, **promptless)
        assert (both - drawn("redux", **promptless)).abs().max() > EFFECT


@pytest.mark.ledger("DS-11")
@pytest.mark.ledger("DS-15")
def test_kontext_controlnet_ip_adapter_and_a_lora_in_one_picture(
    drawn: Callable[..., Tensor], everything: tuple[Pipeline, dict[str, Control]], tmp_path: Path
) -> None:
    names = ("kontext", "controlnet", "ip_adapter")
    without = drawn(*names)
    everything[0].load_lora(lora_for(tmp_path))
    every = drawn(*names, seed=0)
    assert (every - without).abs().max() > EFFECT
    for left_out in names:
        rest = drawn(*(name for name in names if name != left_out), seed=0)
        assert (every - rest).abs().max() > EFFECT, left_out


def test_all_of_them_with_guidance_in_windows_and_within_a_limit(
    drawn: Callable[..., Tensor], plain_model: Path, files: dict[str, dict[str, Any]]
) -> None:
    guided = {"cfg": 3.0, "negative": "a blue square"}
    whole = drawn(*PLAIN, **guided)
    assert whole.isfinite().all()
    assert torch.allclose(drawn(*PLAIN, **guided, denoise_tile=64), whole, atol=1e-4)
    tiled = drawn(*PLAIN, **guided, width=64, denoise_tile=32)
    assert tiled.isfinite().all()
    assert tiled.shape[-2:] == (4, 8)
    limited = Pipeline.load(load_section(plain_model), controls=[files[name] for name in PLAIN], device="cpu", vram_limit=0.0)
    assert torch.equal(latents(limited, **SMALL, **guided), whole)


def load_section(folder: Path) -> dict[str, Any]:
    from tiny_pipeline import model_section

    return model_section(folder)


@pytest.mark.parametrize("base", FEATURES)
@pytest.mark.parametrize("other", ["controlnet", "ip_adapter", "redux", "eligen", "value", "infiniteyou"])
def test_beside_a_transformer_with_more_features(
    base: str, other: str, wide_model: Callable[[int], Path], files: dict[str, dict[str, Any]]
) -> None:
    pipeline = load(wide_model(FEATURES[base]), files[base], files[other])
    own, added = pipeline.controls
    both = latents(pipeline, **SMALL)
    for alone in (own, added):
        pipeline.controls = [alone]
        if alone is own:
            assert (latents(pipeline, **SMALL) - both).abs().max() > EFFECT
    assert both.isfinite().all()


@pytest.mark.parametrize(
    ("names", "channels", "words"),
    [
        (("kontext", "fill"), 384, "kontext does not go with this transformer"),
        (("kontext", "structure"), 128, "kontext does not go with this transformer"),
        (("fill",), 64, "fill needs a transformer made for it"),
        (("structure", "fill"), 384, "structure needs a transformer made for it"),
        (("flex2",), 384, "flex2 needs a transformer made for it"),
        (("eligen", "eligen"), 64, "two"),
        (("redux", "nexus_gen"), 64, "take the prompt's place"),
    ],
)
def test_pairs_that_do_not_go_are_refused(files: dict[str, dict[str, Any]], names: tuple[str, ...], channels: int, words: str) -> None:
    promptless = {"redux": {"keep_prompt": False}, "nexus_gen": {"type": "nexus_gen", "path": "x", "decoder": "y"}}
    tables = [{**files.get(name, {}), **promptless.get(name, {}), "name": f"{name}{number}"} for number, name in enumerate(names)]
    entries = [load_control(table) for table in tables]
    with pytest.raises(ConfigError, match=words):
        check(entries, Ground(in_channels=channels, has_image=True))
