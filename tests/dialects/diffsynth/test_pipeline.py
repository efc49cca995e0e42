"""Calls of the pipeline: its parameters one by one, and what a script must never get silently."""

import inspect
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffsynth_tiny import FILES, SHORT, configs, load
from PIL import Image

from fluxsmith.dialects.diffsynth import FluxImagePipeline, ModelConfig, load_state_dict
from fluxsmith.dialects.diffsynth.call import Call
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.quant.base import QuantLinear

ORDER = [
    "prompt",
    "negative_prompt",
    "cfg_scale",
    "embedded_guidance",
    "t5_sequence_length",
    "input_image",
    "denoising_strength",
    "height",
    "width",
    "seed",
    "rand_device",
    "sigma_shift",
    "num_inference_steps",
    "kontext_images",
    "controlnet_inputs",
    "ipadapter_images",
    "ipadapter_scale",
    "eligen_entity_prompts",
    "eligen_entity_masks",
    "eligen_enable_on_negative",
    "eligen_enable_inpaint",
    "infinityou_id_image",
    "infinityou_guidance",
    "flex_inpaint_image",
    "flex_inpaint_mask",
    "flex_control_image",
    "flex_control_strength",
    "flex_control_stop",
    "value_controller_inputs",
    "step1x_reference_image",
    "nexus_gen_reference_image",
    "lora_encoder_inputs",
    "lora_encoder_scale",
    "flux_fill_image",
    "flux_fill_mask",
    "flux_redux_image",
    "insert_anything_source_image",
    "insert_anything_source_mask",
    "insert_anything_ref_image",
    "insert_anything_ref_mask",
    "tea_cache_l1_thresh",
    "tiled",
    "tile_size",
    "tile_stride",
    "progress_bar_cmd",
]


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.tobytes() == other.tobytes()


@pytest.mark.ledger("DS-02")
@pytest.mark.ledger("DS-03")
def test_parameters_have_their_places_and_defaults() -> None:
    parameters = [*inspect.signature(FluxImagePipeline.__call__).parameters.values()][1:]
    assert [one.name for one in parameters][: len(ORDER)] == ORDER
    defaults = {one.name: one.default for one in parameters}
    assert (defaults["cfg_scale"], defaults["embedded_guidance"], defaults["t5_sequence_length"]) == (1.0, 3.5, 512)
    assert (defaults["height"], defaults["num_inference_steps"], defaults["tile_size"], defaults["tile_stride"]) == (1024, 30, 128, 64)
    assert [*inspect.signature(FluxImagePipeline.from_pretrained).parameters] == [
        "torch_dtype", "device", "model_configs", "tokenizer_1_config", "tokenizer_2_config", "nexus_gen_processor_config",
        "step1x_processor_config", "vram_limit",
    ]  # fmt: skip


@pytest.mark.ledger("DS-01")
@pytest.mark.ledger("DS-34")
def test_local_files_are_enough(models_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refused)
    monkeypatch.setattr(socket, "create_connection", refused)
    found = configs(models_root, skip_download=None)
    tokenizers = configs(models_root, "tokenizer/", "tokenizer_2/", skip_download=None)
    options = {"tokenizer_1_config": tokenizers[0], "tokenizer_2_config": tokenizers[1]}
    pipe = FluxImagePipeline.from_pretrained(torch_dtype=torch.float32, device="cpu", model_configs=found, **options)
    assert pipe("a red circle", **SHORT).size == (48, 32)


@pytest.mark.ledger("DS-01")
def test_paths_and_lists_of_shards_load_the_same(pipe: FluxImagePipeline, models_root: Path) -> None:
    folder = models_root / "black-forest-labs/FLUX.1-dev"
    shard = folder / "text_encoder_2/model-00001-of-00001.safetensors"
    paths = [str(folder / FILES[0]), str(folder / FILES[1]), [str(shard)], folder / FILES[3]]
    other = FluxImagePipeline.from_pretrained(torch.float32, "cpu", [ModelConfig(path=path) for path in paths])
    assert same(other("a red circle", **SHORT), pipe("a red circle", **SHORT))
    assert other.dit is not None
    assert next(other.dit.parameters()).dtype == torch.float32


def test_the_default_type_is_bf16(models_root: Path) -> None:
    pipe = FluxImagePipeline.from_pretrained(device="cpu", model_configs=configs(models_root))
    for held in (pipe.dit, pipe.text_encoder_1, pipe.text_encoder_2, pipe.vae_decoder):
        assert held is not None
        assert next(held.parameters()).dtype == pipe.torch_dtype == torch.bfloat16
    assert pipe("a red circle", **SHORT).size == (48, 32)


@pytest.mark.ledger("DS-02")
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"prompt": "a red circle"}, {"prompt": "a blue square"}),
        ({"cfg_scale": 2.0}, {"cfg_scale": 1.0}),
        ({"cfg_scale": 0.5}, {"cfg_scale": 1.0}),
        ({"cfg_scale": 2.0, "negative_prompt": "a yellow ring"}, {"cfg_scale": 2.0}),
        ({"embedded_guidance": 1.0}, {}),
        ({"t5_sequence_length": 8}, {"t5_sequence_length": 512}),
        ({"seed": 2}, {}),
        ({"sigma_shift": 1.0}, {}),
        ({"num_inference_steps": 3}, {}),
    ],
)
def test_a_parameter_changes_the_picture(pipe: FluxImagePipeline, one: dict[str, Any], other: dict[str, Any]) -> None:
    assert not same(pipe(**{**SHORT, "prompt": "a star", **one}), pipe(**{**SHORT, "prompt": "a star", **other}))


@pytest.mark.ledger("DS-03")
def test_without_a_seed_the_global_generator_draws(pipe: FluxImagePipeline) -> None:
    options = {**SHORT, "seed": None}
    torch.manual_seed(5)
    first, second = pipe("a", **options), pipe("a", **options)
    torch.manual_seed(5)
    assert same(pipe("a", **options), first)
    assert not same(first, second)


@pytest.mark.ledger("DS-03")
def test_sides_are_rounded_up(pipe: FluxImagePipeline) -> None:
    assert same(pipe("a", **{**SHORT, "height": 17, "width": 33}), pipe("a", **SHORT))


@pytest.mark.ledger("DS-04")
def test_image_to_image_starts_from_a_picture_of_the_right_size(pipe: FluxImagePipeline, picture: Image.Image) -> None:
    def drawn(strength: float) -> Image.Image:
        return pipe("a", **SHORT, input_image=picture, denoising_strength=strength)

    assert not same(drawn(0.3), drawn(0.8))
    assert same(drawn(1.0), pipe("a", **SHORT))
    with pytest.raises(ConfigError, match=r"48 x 32 pixels and the picture 64 x 32.*pass width=48, height=32"):
        pipe("a", **{**SHORT, "width": 64}, input_image=picture, denoising_strength=0.5)


@pytest.mark.ledger("DS-05")
def test_tiles_are_counted_in_latent_cells(pipe: FluxImagePipeline) -> None:
    request = pipe.request(Call(tiled=True))
    assert (request.tile, request.overlap) == (1024, 512)
    assert pipe.request(Call(tile_size=1)).tiling() is None
    whole = pipe("a", **SHORT)
    assert same(pipe("a", **SHORT, tiled=True), whole)  # one tile covers it
    tiles = pipe("a", **SHORT, tiled=True, tile_size=3, tile_stride=2)
    assert tiles.size == whole.size
    assert not same(tiles, whole)
    with pytest.raises(ConfigError, match="must not leave gaps"):
        pipe("a", **SHORT, tiled=True, tile_size=3, tile_stride=4)


@pytest.mark.ledger("DS-06")
def test_the_progress_bar_sees_every_step(pipe: FluxImagePipeline) -> None:
    seen: list[float] = []

    def bar(steps: Iterable[Any]) -> Iterator[Any]:
        for step in steps:
            seen.append(float(step))
            yield step
        seen.append(-1)

    pipe("a", **{**SHORT, "progress_bar_cmd": bar, "num_inference_steps": 3})
    assert seen == pytest.approx([1000, 751.121, 8.929, -1], abs=1e-2)


@pytest.mark.ledger("DS-23")
def test_tea_cache_leaves_steps_out(pipe: FluxImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**SHORT, "num_inference_steps": 6, "cfg_scale": 2.0}
    plain = pipe("a", **options)
    assert same(pipe("a", **options, tea_cache_l1_thresh=0), plain)
    assert not same(pipe("a", **options, tea_cache_l1_thresh=5.0), plain)


def test_windows_of_denoising_are_an_option_of_its_own(pipe: FluxImagePipeline) -> None:
    assert not same(pipe("a", **SHORT, denoise_tile=32, denoise_overlap=16), pipe("a", **SHORT))


def test_pictures_are_cut_off_not_rounded() -> None:
    from fluxsmith.dialects.diffsynth.picture import to_image

    pixels = torch.tensor([-1.2, 0.0, 0.999, 1.0]).reshape(1, 1, 4).expand(3, 1, 4)
    assert [value[0] for value in to_image(pixels).get_flattened_data()] == [0, 127, 254, 255]  # type: ignore[attr-defined]


def test_what_cannot_be_drawn_is_said_once_and_whole(pipe: FluxImagePipeline, picture: Image.Image) -> None:
    with pytest.raises(ConfigError) as caught:
        pipe(["a", "b"], t5_sequence_length=0, input_image=picture, multidiffusion_prompts=["a"])  # type: ignore[arg-type]
    assert [problem.what.split()[0] for problem in caught.value.problems] == ["the", "t5_sequence_length", "input_image", "multidiffusion"]
    with pytest.raises(ConfigError, match="did you mean num_inference_steps"):
        pipe("a", num_inference_step=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="denoising_strength without input_image"):
        pipe("a", **SHORT, denoising_strength=0.5)
    with pytest.raises(ConfigError, match=r"flux_redux_image needs a model that is not loaded.*FLUX.1-Redux-dev"):
        pipe("a", **SHORT, flux_redux_image=picture)


@pytest.mark.ledger("DS-01")
def test_files_are_refused_before_weights_are_read(models_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fluxsmith.io.safetensors import WeightsFile, save_weights

    monkeypatch.setattr(WeightsFile, "tensor", lambda *a, **k: pytest.fail("a weight was read"))
    save_weights(tmp_path / "strange.safetensors", {"what.is.this": torch.zeros(2)})
    save_weights(tmp_path / "lora.safetensors", {"blocks.0.attn.a_to_qkv.lora_A.default.weight": torch.zeros(2, 2)})
    with pytest.raises(ModelFileError) as caught:
        load(
            models_root,
            *configs(models_root, FILES[0]),
            *(ModelConfig(path=tmp_path / f"{name}.safetensors") for name in ("strange", "lora")),
        )
    text = [str(problem) for problem in caught.value.problems]
    assert len(text) == 3
    assert "second one of its kind" in text[0]
    assert "strange.safetensors: this is no model that fluxsmith knows" in text[1]
    assert "pipe.load_lora" in text[2]
    with pytest.raises(ModelFileError, match="the CLIP-L text encoder is missing from model_configs") as caught:
        FluxImagePipeline.from_pretrained(model_configs=configs(models_root, FILES[0], FILES[3]))
    assert len(caught.value.problems) == 2
    with pytest.raises(ModelFileError, match="no file matches"):
        FluxImagePipeline.from_pretrained(model_configs=configs(models_root, "flux1-schnell.safetensors"))
    with pytest.raises(ConfigError, match="names no model"):
        ModelConfig().files()


@pytest.mark.ledger("DS-01")
def test_weights_in_memory_and_what_a_file_cannot_be(pipe: FluxImagePipeline, models_root: Path) -> None:
    folder = models_root / "black-forest-labs/FLUX.1-dev"
    held = ModelConfig(state_dict=load_state_dict(folder / FILES[0]))
    other = FluxImagePipeline.from_pretrained(torch.float32, "cpu", [held, *configs(models_root, *FILES[1:])])
    assert same(other("a star", **SHORT), pipe("a star", **SHORT))
    cleared, quantised = (
        configs(models_root, FILES[0], clear_parameters=True),
        configs(models_root, FILES[3], quantize="torchao_int8_w8a16"),
    )
    with pytest.raises(ModelFileError, match="without weights.*for training"):
        FluxImagePipeline.from_pretrained(model_configs=[*cleared, *configs(models_root, *FILES[1:])])
    with pytest.raises(ModelFileError, match="autoencoder.*cannot be quantised"):
        FluxImagePipeline.from_pretrained(model_configs=[*configs(models_root, *FILES[:3]), *quantised])
    small = configs(models_root, FILES[0], quantize="torchao_int8_w8a16")
    few = FluxImagePipeline.from_pretrained(torch.float32, "cpu", [*small, *configs(models_root, *FILES[1:])])
    assert few.dit is not None
    assert any(isinstance(module, QuantLinear) for module in few.dit.modules())


def test_where_files_are(models_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models_root / "black-forest-labs/FLUX.1-dev"
    assert ModelConfig("black-forest-labs/FLUX.1-dev", origin_file_pattern="ae.safetensors").model_id == "black-forest-labs/FLUX.1-dev"
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(models_root))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "True")
    named = ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="text_encoder_2/")
    assert named.weights() == [folder / "text_encoder_2/model-00001-of-00001.safetensors"]
    both = ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern=["ae.safetensors", "flux1-dev.safetensors"])
    assert both.weights() == [folder / "ae.safetensors", folder / "flux1-dev.safetensors"]
    for name in ("a.bin", "a.safetensors", "b.bin", "config.json"):
        (tmp_path / name).touch()
    assert [path.name for path in ModelConfig(path=tmp_path).weights()] == ["a.safetensors", "b.bin"]
