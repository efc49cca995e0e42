"""The pipeline on a tiny model: what changes a picture and what does not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fluxsmith.config.load import load_model
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.generate import pipeline as pipeline_module
from fluxsmith.generate.pipeline import Pipeline, start_noise, to_image
from fluxsmith.generate.request import Request
from fluxsmith.models.tiling import Tiling

BASE = Request("a large red circle at center on a grey background", width=32, height=32, steps=3, seed=5)


def latents(pipeline: Pipeline, **changes: Any) -> Tensor:
    with torch.no_grad():
        return pipeline.latents(pipeline.completed(replace(BASE, **changes)))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float)


# ---- seeds and settings ---------------------------------------------------------------------------------------------


def test_the_same_seed_is_the_same_picture(pipeline: Pipeline) -> None:
    first, second = pipeline.generate(BASE), pipeline.generate(BASE)
    assert first.image.size == (32, 32)
    assert first.image.tobytes() == second.image.tobytes()
    assert first.image.tobytes() != pipeline.generate(replace(BASE, seed=6)).image.tobytes()


def test_the_global_random_state_has_no_say(pipeline: Pipeline) -> None:
    first = latents(pipeline)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(first, latents(pipeline))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "a small blue square"},
        {"guidance": 5.0},
        {"cfg": 3.0},
        {"steps": 4},
        {"shift": 3.0},
        {"shift": "flux"},
        {"sampler": "heun"},
    ],
    ids=str,
)
def test_what_changes_the_picture(pipeline: Pipeline, changes: dict[str, Any]) -> None:
    assert (latents(pipeline) - latents(pipeline, **changes)).abs().max() > 1e-3


def test_the_negative_prompt_acts_through_true_guidance_only(pipeline: Pipeline) -> None:
    guided = latents(pipeline, cfg=3.0)
    assert (guided - latents(pipeline, cfg=3.0, negative="a blue square")).abs().max() > 1e-3
    assert torch.equal(latents(pipeline, cfg=3.0, negative=BASE.prompt), latents(pipeline, cfg=2.0, negative=BASE.prompt))
    with pytest.raises(ConfigError, match="no effect while cfg is 1"):
        pipeline.generate(replace(BASE, negative="a blue square"))


def test_defaults_are_those_of_the_preset(pipeline: Pipeline) -> None:
    completed = pipeline.completed(Request("a"))
    assert (completed.steps, completed.guidance, completed.shift) == (12, 2.5, "none")
    assert pipeline.generate(replace(BASE, steps=None)).settings["steps"] == 12


def test_sides_need_not_be_equal(pipeline: Pipeline) -> None:
    assert pipeline.generate(replace(BASE, width=48, height=16)).image.size == (48, 16)


def test_bad_requests_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ConfigError) as caught:
        pipeline.generate(Request("a", width=20, steps=0))
    assert len(caught.value.problems) == 2


def test_the_callback_sees_every_step(pipeline: Pipeline) -> None:
    seen: list[int] = []
    pipeline.generate(BASE, callback=lambda step, x, clean: seen.append(step))
    assert seen == [0, 1, 2]


def test_noise_comes_from_the_host_and_the_seed_alone() -> None:
    assert torch.equal(start_noise(3, 16, 4, 4), start_noise(3, 16, 4, 4))
    assert not torch.equal(start_noise(3, 16, 4, 4), start_noise(4, 16, 4, 4))
    assert start_noise(3, 16, 64, 64).std().item() == pytest.approx(1, abs=0.02)


def test_pixels_are_rounded_and_clamped() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).expand(3, 1, 5)
    assert np.asarray(to_image(values))[0, :, 0].tolist() == [0, 0, 128, 255, 255]


# ---- image to image -------------------------------------------------------------------------------------------------


@pytest.mark.ledger("DS-04")
def test_small_strength_stays_near_the_start(pipeline: Pipeline, start: Image.Image) -> None:
    request = replace(BASE, width=64, height=32, steps=10, image=start)
    with torch.no_grad():
        unchanged = pixels(to_image(pipeline.decode(pipeline.encode_image(request, torch.device("cpu")), request)[0]))
    far = [np.abs(pixels(pipeline.generate(replace(request, strength=strength)).image) - unchanged).mean() for strength in (0.1, 0.4, 0.8)]
    assert far[0] < far[1] < far[2]
    assert far[0] < far[2] / 3


@pytest.mark.ledger("DS-04")
def test_full_strength_forgets_the_start(pipeline: Pipeline, start: Image.Image) -> None:
    assert torch.equal(latents(pipeline, image=start, strength=1.0), latents(pipeline))
    assert not torch.equal(latents(pipeline, image=start, strength=0.6), latents(pipeline))


@pytest.mark.ledger("DS-04")
def test_the_start_is_cropped_not_squeezed(pipeline: Pipeline, start: Image.Image) -> None:
    """A wide picture in a square request keeps its shape: the middle of it, not all of it made narrow."""
    device = torch.device("cpu")
    square = replace(BASE, image=start, strength=0.5)
    middle = start.crop((16, 0, 48, 32))
    assert torch.equal(pipeline.encode_image(square, device), pipeline.encode_image(replace(square, image=middle), device))


# ---- the autoencoder in tiles ---------------------------------------------------------------------------------------


@pytest.mark.ledger("DS-05")
def test_tiles_are_used_where_asked_for_and_for_large_pictures(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Tiling] = []

    def tiled(codec: Any, x: Tensor, tiling: Tiling) -> Tensor:
        used.append(tiling)
        return x.new_zeros(1, 3, x.shape[-2] * 8, x.shape[-1] * 8)

    monkeypatch.setattr(pipeline_module, "tiled_decode", tiled)
    pipeline.generate(BASE)
    assert used == []
    pipeline.generate(replace(BASE, tile=16, overlap=0))
    pipeline.decode(torch.zeros(1, 16, 256, 200), Request("a", width=1600, height=2048))
    assert used == [Tiling(16, 0), Tiling(1024, 256)]


@pytest.mark.ledger("DS-05")
def test_tiles_give_nearly_the_same_picture(pipeline: Pipeline) -> None:
    request = replace(BASE, width=96, height=80)
    whole = pixels(pipeline.generate(request).image)
    tiled = pixels(pipeline.generate(replace(request, tile=64, overlap=32)).image)
    assert tiled.shape == whole.shape
    assert not np.array_equal(tiled, whole)
    assert np.abs(tiled - whole).mean() < 0.1 * whole.std()


# ---- LoRA -----------------------------------------------------------------------------------------------------------


def test_weights_of_a_lora_add_up(pipeline: Pipeline, make_lora: Any) -> None:
    path = make_lora("a", seed=1)
    base = latents(pipeline)
    pipeline.load_lora(path, 1.0)
    once = latents(pipeline)
    pipeline.clear_loras()
    pipeline.load_lora(path, 0.25)
    pipeline.load_lora(path, 0.75)
    assert torch.allclose(latents(pipeline), once, atol=1e-5)
    assert (once - base).abs().max() > 1e-2


def test_several_loras_are_the_sum_of_their_differences(pipeline: Pipeline, make_lora: Any) -> None:
    """Two files at once draw what a model with both merged into its weights draws."""
    files = {make_lora("a", seed=1): 0.5, make_lora("b", seed=2): -1.5}
    for path, weight in files.items():
        pipeline.load_lora(path, weight)
    together = latents(pipeline)
    bases = {path: layer for group in pipeline.loras for path, layer in group.bases.items()}
    before = {path: layer.weight.detach().clone() for path, layer in bases.items()}
    deltas = [(path, adapter.delta(bases[path].weight)) for group in pipeline.loras for path, adapter in group.adapters.items()]
    pipeline.clear_loras()
    with torch.no_grad():
        for path, delta in deltas:
            bases[path].weight += delta
        merged = latents(pipeline)
        for path, weight in before.items():
            bases[path].weight.copy_(weight)
    assert torch.allclose(together, merged, atol=1e-4)


def test_weight_0_is_the_base(pipeline: Pipeline, make_lora: Any) -> None:
    base = latents(pipeline)
    pipeline.load_lora(make_lora("a", seed=1), 0.0)
    assert torch.equal(latents(pipeline), base)


def test_clearing_brings_the_same_bits_back(pipeline: Pipeline, make_lora: Any) -> None:
    base = latents(pipeline)
    keys = set(pipeline.models.loaded()["dit"].state_dict())
    for name, seed in (("a", 1), ("b", 2)):
        pipeline.load_lora(make_lora(name, seed=seed), 2.0)
    assert not torch.equal(latents(pipeline), base)
    pipeline.clear_loras()
    assert torch.equal(latents(pipeline), base)
    assert set(pipeline.models.loaded()["dit"].state_dict()) == keys


def test_text_encoders_are_adapted_too(pipeline: Pipeline, make_lora: Any) -> None:
    base = latents(pipeline)
    pipeline.load_lora(make_lora("text", seed=3, size=1.0, text_encoders=["clip_l"], dit_lr=0.0))
    assert not torch.equal(latents(pipeline), base)


def test_a_lora_that_does_not_fit_is_refused_and_leaves_nothing(pipeline: Pipeline, tiny_model: Path, fixtures_root: Path) -> None:
    base = latents(pipeline)
    for path in (tiny_model / "dit.safetensors", fixtures_root / "flux-dev-lora-tiny/kohya.safetensors", tiny_model / "none.safetensors"):
        with pytest.raises(ModelFileError) as caught:
            pipeline.load_lora(path)
        assert str(path) in str(caught.value)
    assert pipeline.loras == []
    assert torch.equal(latents(pipeline), base)


# ---- loading --------------------------------------------------------------------------------------------------------


def test_missing_files_are_all_named(tmp_path: Path, tiny_section: dict[str, str]) -> None:
    section = {**tiny_section, "path": str(tmp_path / "no.safetensors"), "t5xxl": tiny_section["clip_l"]}
    with pytest.raises(ModelFileError) as caught:
        Pipeline.load(load_model({"model": section}))
    assert len(caught.value.problems) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_card_is_said(tiny_section: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        Pipeline.load(load_model({"model": tiny_section}), device="cuda")
