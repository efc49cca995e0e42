"""The bundled model as users get it: it draws what captions say, in every way of drawing."""

import pytest
import torch

from fluxsmith.demo.measure import read
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.generate.request import Request
from fluxsmith.io import sources

pytestmark = [
    pytest.mark.ledger("FS-01"),
    pytest.mark.skipif(not (sources.BUNDLE_FOLDER / "flux-shapes").is_dir(), reason="this checkout has no bundled model"),
]
PROMPT = "a large red circle at center on a grey background"


@pytest.fixture(scope="module")
def bundle() -> Pipeline:
    return Pipeline.load({"type": "flux1", "preset": "flux-shapes"}, device="cpu")


@pytest.mark.parametrize(
    "settings",
    [{}, {"guidance": 1.0}, {"guidance": 1.0, "cfg": 2.0}, {"sampler": "heun", "steps": 6}, {"steps": 24}, {"shift": 1.5}],
    ids=str,
)
def test_it_draws_what_the_caption_says(bundle: Pipeline, settings: dict[str, float]) -> None:
    seen = read(bundle.generate(Request(PROMPT, width=64, height=64, seed=4, **settings)).image)  # type: ignore[arg-type]
    assert (seen.shape, seen.color, seen.position, seen.background) == ("circle", "red", "center", "grey")


def test_its_guidance_input_acts(bundle: Pipeline) -> None:
    """It was distilled; without that stage the input would change nothing."""
    with torch.no_grad():
        low, high = (bundle.latents(bundle.completed(Request(PROMPT, width=64, height=64, guidance=g))) for g in (1.0, 5.0))
    assert (low - high).abs().mean() > 0.02


@pytest.mark.ledger("DS-04")
def test_image_to_image_keeps_the_place_and_changes_the_colour(bundle: Pipeline) -> None:
    start = bundle.generate(Request("a large red square at top left on a cream background", width=64, height=64, seed=1)).image
    request = Request("a large blue square at top left on a cream background", width=64, height=64, image=start, strength=0.8)
    seen = read(bundle.generate(request).image)
    assert (seen.position, seen.color) == ("top left", "blue")


@pytest.mark.ledger("DS-05")
def test_the_autoencoder_in_tiles_shows_no_seams(bundle: Pipeline) -> None:
    request = Request(PROMPT, width=64, height=64, seed=4)
    with torch.no_grad():
        latents = bundle.latents(bundle.completed(request))
        whole = bundle.decode(latents, request)
        tiled = bundle.decode(latents, Request(PROMPT, width=64, height=64, tile=48, overlap=16))
    assert (whole - tiled).abs().max() < 0.25
    assert (whole - tiled).abs().mean() < 0.01
