"""Parameters that bring controls: each has an effect, acts on the right network, and says what is missing."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffsynth_models
import diffsynth_tiny
import pytest
import torch
from diffsynth_tiny import FILES, SHORT
from PIL import Image

from fluxsmith.dialects.diffsynth import Annotator, ControlNetInput, FluxImagePipeline, ModelConfig, download_models
from fluxsmith.errors import ConfigError

Load = Callable[..., FluxImagePipeline]
UNION, INPAINT = "InstantX/FLUX.1-dev-Controlnet-Union-alpha", "alimama-creative/FLUX.1-dev-Controlnet-Inpainting-Beta"
INFINITE = "ByteDance/InfiniteYou"
DEV = f"{diffsynth_tiny.DEV}:{FILES[0]}"
NET = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def load(all_models: Path) -> Iterator[Load]:
    """`load("org/name:file", ...)`: FLUX.1-dev with these models; without its transformer where `dit` names another."""
    patch = pytest.MonkeyPatch()
    for name, value in diffsynth_models.SMALL_HEADS.items():
        patch.setattr(name, value)

    def make(
        *names: str, dit: str = f"{diffsynth_tiny.DEV}:{FILES[0]}", base: tuple[str, ...] = FILES[1:], **options: Any
    ) -> FluxImagePipeline:
        named = [name.split(":") for name in (dit, *(f"{diffsynth_tiny.DEV}:{file}" for file in base), *names)]
        place = {"local_model_path": all_models, "skip_download": True}
        configs = [ModelConfig(model_id=model, origin_file_pattern=pattern, **place) for model, pattern in named]
        processors = {
            "nexus_gen_processor_config": ModelConfig(model_id="DiffSynth-Studio/Nexus-GenV2", origin_file_pattern="processor/", **place),
            "step1x_processor_config": ModelConfig(model_id="Qwen/Qwen2.5-VL-7B-Instruct", origin_file_pattern="", **place),
        }
        return FluxImagePipeline.from_pretrained(torch.float32, "cpu", configs, **processors, **options)

    yield make
    patch.undo()


def shown(seed: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8).numpy())


def mask(box: tuple[int, int, int, int]) -> Image.Image:
    made = Image.new("RGB", (48, 32))
    made.paste((255, 255, 255), box)
    return made


def latents(pipe: FluxImagePipeline, prompt: str = "a star", **options: Any) -> torch.Tensor:
    """What a call denoises: finer than its 8-bit picture."""
    seen: list[torch.Tensor] = []
    decode = pipe.native.decode
    pipe.native.decode = lambda x, request: (seen.append(x), decode(x, request))[1]  # type: ignore[method-assign]
    try:
        pipe(prompt, **{**SHORT, **options})
    finally:
        pipe.native.decode = decode  # type: ignore[method-assign]
    return seen[0]


def all_differ(*results: torch.Tensor) -> bool:
    return all(not torch.equal(one, other) for i, one in enumerate(results) for other in results[:i])


@pytest.mark.ledger("DS-11")
def test_kontext(pipe: FluxImagePipeline) -> None:
    assert all_differ(latents(pipe), *(latents(pipe, kontext_images=images) for images in (shown(1), [shown(1), shown(2, (32, 64))])))
    nothing: dict[str, Any] = dict.fromkeys(("kontext_images", "controlnet_inputs", "ipadapter_images", "value_controller_inputs"), [])
    assert torch.equal(latents(pipe, **nothing), latents(pipe))


@pytest.mark.ledger("DS-12")
@pytest.mark.ledger("DS-13")
@pytest.mark.ledger("DS-14")
def test_every_controlnet_is_kept_and_named_by_its_number(load: Load) -> None:
    pipe = load(f"{UNION}:{NET}", f"{INPAINT}:{NET}", f"jasperai/Flux.1-dev-Controlnet-Upscaler:{NET}")
    assert pipe.controlnet is not None
    assert len(pipe.controlnet) == 3
    assert [held.control.condition_channels for held in pipe.controlnet.models] == [64, 68, 64]

    def drawn(*inputs: ControlNetInput, **options: Any) -> torch.Tensor:
        return latents(pipe, controlnet_inputs=list(inputs), **options)

    canny = ControlNetInput(image=shown(1), processor_id="canny")
    depth = ControlNetInput(image=shown(1), processor_id="depth", scale=0.3)
    paint = ControlNetInput(1, image=shown(1), inpaint_mask=mask((8, 8, 32, 24)), scale=0.9)
    upscale = ControlNetInput(2, image=shown(1))
    assert all_differ(latents(pipe), drawn(canny), drawn(depth), drawn(paint), drawn(upscale), drawn(canny, depth), drawn(canny, upscale))
    late = ControlNetInput(2, image=shown(1), start=0.5)  # progress 1 is the first step
    early = ControlNetInput(2, image=shown(1), end=0.5)
    assert all_differ(drawn(late), drawn(early), drawn(upscale))
    assert torch.equal(drawn(ControlNetInput(2, image=shown(1), start=0.4, end=0.3)), latents(pipe))
    assert all_differ(drawn(upscale, cfg_scale=2.0), drawn(upscale))
    for wrong, said in (
        (ControlNetInput(3, image=shown(1)), "controlnet_id = 3, and 3 ControlNets are loaded"),
        (ControlNetInput(0, image=shown(1), processor_id="sketch"), "use one of canny"),
        (ControlNetInput(2), "picture"),
        (ControlNetInput(1, image=shown(1)), "mask"),
    ):
        with pytest.raises(ConfigError, match=said):
            drawn(wrong)


@pytest.mark.ledger("DS-15")
def test_ip_adapter_from_its_pickle(load: Load) -> None:
    pipe = load("InstantX/FLUX.1-dev-IP-Adapter:ip-adapter.bin", "google/siglip-so400m-patch14-384:model.safetensors")
    assert pipe.ipadapter is not None
    one = latents(pipe, ipadapter_images=shown(1))
    assert all_differ(
        latents(pipe),
        one,
        latents(pipe, ipadapter_images=[shown(1), shown(2)]),
        latents(pipe, ipadapter_images=[shown(1)], ipadapter_scale=0.5),
    )
    with pytest.raises(ConfigError, match="no encoder"):
        load("InstantX/FLUX.1-dev-IP-Adapter:ip-adapter.bin")


@pytest.mark.ledger("DS-16")
def test_infiniteyou_with_and_without_a_controlnet_input(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    faces: list[Image.Image] = []

    def look(image: Image.Image, **options: Any) -> torch.Tensor:
        faces.append(image)
        return torch.linspace(-1, 1, 8)

    monkeypatch.setattr("fluxsmith.controls.infiniteyou.face_vector", look)
    monkeypatch.setattr("fluxsmith.controls.infiniteyou.missing_packages", list)
    folder = "infu_flux_v1.0/aes_stage2"
    pipe = load(f"{INFINITE}:{folder}/image_proj_model.*", f"{INFINITE}:{folder}/InfuseNetModel/*.safetensors", f"{UNION}:{NET}")
    assert pipe.image_proj_model is not None
    black = Image.new("RGB", (48, 32))
    alone = latents(pipe, infinityou_id_image=shown(1))
    assert torch.equal(latents(pipe, infinityou_id_image=shown(1), controlnet_inputs=[ControlNetInput(image=black)]), alone)
    assert all_differ(
        latents(pipe),
        alone,
        latents(pipe, infinityou_id_image=shown(1), infinityou_guidance=2.0),
        latents(pipe, controlnet_inputs=[ControlNetInput(image=black)]),
        latents(pipe, infinityou_id_image=shown(1), controlnet_inputs=[ControlNetInput(1, image=black, processor_id="pose")]),
    )
    assert faces
    with pytest.raises(ConfigError, match="no path"):
        load(f"{INFINITE}:{folder}/image_proj_model.*")


@pytest.mark.ledger("DS-17")
def test_eligen(pipe: FluxImagePipeline, picture: Image.Image) -> None:
    entities = {"eligen_entity_prompts": ["a ring", "a moon"], "eligen_entity_masks": [mask((0, 0, 24, 32)), mask((24, 0, 48, 32))]}
    plain = latents(pipe, **entities)
    guided = {"cfg_scale": 2.0, **entities}
    assert all_differ(latents(pipe), plain)
    assert all_differ(latents(pipe, **guided), latents(pipe, **guided, eligen_enable_on_negative=True))
    assert torch.equal(latents(pipe, **entities, eligen_enable_on_negative=True), plain)  # without a negative branch
    half = {
        **entities,
        "eligen_entity_masks": [mask((0, 0, 16, 32)), mask((0, 0, 16, 32))],
        "input_image": picture,
        "denoising_strength": 1.0,
    }
    assert all_differ(latents(pipe, **half), latents(pipe, **half, eligen_enable_inpaint=True))
    with pytest.raises(ConfigError, match="2 eligen_entity_prompts and 1 eligen_entity_masks"):
        pipe("a", **SHORT, **{**entities, "eligen_entity_masks": [picture]})


@pytest.mark.ledger("DS-18")
@pytest.mark.ledger("DS-36")
def test_values_and_lora_encoder(load: Load, all_models: Path) -> None:
    pipe = load(
        "DiffSynth-Studio/AttriCtrl-FLUX.1-Dev:models/*.safetensors", "DiffSynth-Studio/LoRA-Encoder-FLUX.1-Dev:model.safetensors"
    )  # fmt: skip
    assert pipe.value_controller is not None
    assert len(pipe.value_controller) == 2
    assert pipe.lora_encoder is not None
    assert all_differ(latents(pipe), *(latents(pipe, value_controller_inputs=values) for values in (0.1, [0.9], [0.1, 0.5])))
    with pytest.raises(ConfigError, match="3 value_controller_inputs, and 2 value controllers"):
        latents(pipe, value_controller_inputs=[0, 0, 0])
    with pytest.raises(ConfigError, match="value_controller_inputs"):
        latents(pipe, value_controller_inputs=1.5)
    lora = ModelConfig(model_id="VoidOc/flux_animal_forest1", origin_file_pattern="20.safetensors", local_model_path=all_models)
    other = str(all_models / "cancel13/cxsk/30.safetensors")
    one = latents(pipe, lora_encoder_inputs=lora)
    assert all_differ(
        latents(pipe),
        one,
        latents(pipe, lora_encoder_inputs=lora, lora_encoder_scale=0.5),
        latents(pipe, lora_encoder_inputs=[lora, other]),
    )


@pytest.mark.ledger("DS-36")
def test_redux_has_no_use_for_the_prompt(load: Load) -> None:
    redux = "black-forest-labs/FLUX.1-Redux-dev"
    pipe = load(f"{redux}:image_encoder/model.safetensors", f"{redux}:image_embedder/diffusion_pytorch_model.safetensors")
    one = latents(pipe, flux_redux_image=shown(1))
    assert all_differ(latents(pipe), one, latents(pipe, flux_redux_image=shown(2)))
    assert torch.equal(latents(pipe, "a moon", flux_redux_image=shown(1)), one)


@pytest.mark.ledger("DS-36")
def test_fill_with_and_without_pictures(load: Load) -> None:
    pipe = load(dit="black-forest-labs/FLUX.1-Fill-dev:flux1-fill-dev.safetensors")
    drawn = [latents(pipe, flux_fill_image=shown(1), flux_fill_mask=mask(box).convert("L")) for box in ((0, 0, 24, 32), (24, 0, 48, 32))]
    assert all_differ(latents(pipe), *drawn)
    with pytest.raises(ConfigError, match="mask but no image"):
        latents(pipe, flux_fill_mask=mask((0, 0, 8, 8)))


@pytest.mark.ledger("DS-21")
def test_flex(load: Load) -> None:
    pipe = load(dit="ostris/Flex.2-preview:Flex.2-preview.safetensors")
    control = {"flex_control_image": shown(2)}
    assert all_differ(
        latents(pipe),
        latents(pipe, flex_inpaint_image=shown(1), flex_inpaint_mask=mask((8, 8, 24, 24))),
        latents(pipe, **control),
        latents(pipe, **control, flex_control_strength=0.9),
        latents(pipe, **control, flex_control_stop=1.0),
    )


@pytest.mark.ledger("DS-20")
def test_step1x(load: Load) -> None:
    edit, qwen = "stepfun-ai/Step1X-Edit:step1x-edit-i1258.safetensors", "Qwen/Qwen2.5-VL-7B-Instruct:model-*.safetensors"
    pipe = load(qwen, "stepfun-ai/Step1X-Edit:vae.safetensors", dit=edit, base=())
    one, other = (latents(pipe, step1x_reference_image=shown(seed), cfg_scale=6.0) for seed in (1, 2))
    assert all_differ(one, other, latents(pipe, "a moon", step1x_reference_image=shown(1), cfg_scale=6.0))
    with pytest.raises(ConfigError, match="no picture to change"):
        latents(pipe)
    with pytest.raises(ConfigError, match=r"needs Qwen2\.5-VL"):
        load("stepfun-ai/Step1X-Edit:vae.safetensors", dit=edit, base=())


@pytest.mark.ledger("DS-22")
def test_nexus_gen(load: Load) -> None:
    nexus = "DiffSynth-Studio/Nexus-GenV2"
    drawing = load(f"{nexus}:model*.safetensors", dit=f"{nexus}:generation_decoder.bin")
    assert all_differ(latents(drawing), latents(drawing, "a moon"))
    editing = load(f"{nexus}:model*.safetensors", dit=f"{nexus}:edit_decoder.bin")
    assert all_differ(latents(editing, nexus_gen_reference_image=shown(1)), latents(editing, nexus_gen_reference_image=shown(2)))
    with pytest.raises(ConfigError, match="no picture to change"):
        latents(editing)


@pytest.mark.ledger("DS-19")
def test_lora_fusion(load: Load, all_models: Path) -> None:
    pipe = load("DiffSynth-Studio/LoRAFusion-preview-FLUX.1-dev:model.safetensors")
    plain = latents(pipe)
    pipe.enable_lora_merger()
    names = ("cancel13/cxsk/30", "DiffSynth-Studio/ArtAug-lora-FLUX.1dev-v1/merged_lora")
    for name in names:
        pipe.load_lora(pipe.dit, str(all_models / f"{name}.safetensors"))
    fused = latents(pipe)
    pipe.clear_lora()
    assert torch.equal(latents(pipe), plain)
    for name in names:
        pipe.load_lora(pipe.dit, str(all_models / f"{name}.safetensors"))
    assert torch.equal(latents(pipe), fused)
    added = load()
    for name in names:
        added.load_lora(added.dit, str(all_models / f"{name}.safetensors"), hotload=True)
    assert all_differ(plain, fused, latents(added))
    added.enable_lora_magic()
    assert not added.merger_enabled
    with pytest.raises(ConfigError, match="LoRAFusion-preview"):
        added.enable_lora_merger()


def test_several_at_once_and_within_a_limit(load: Load) -> None:
    names = (f"{UNION}:{NET}", "InstantX/FLUX.1-dev-IP-Adapter:ip-adapter.bin", "google/siglip-so400m-patch14-384:model.safetensors")
    options = {
        "kontext_images": [shown(1)],
        "controlnet_inputs": [ControlNetInput(image=shown(2), processor_id="canny")],
        "ipadapter_images": [shown(3)],
        "cfg_scale": 2.0,
    }
    expected = latents(load(*names), **options)
    for limit in (0.0, 50.0):
        assert torch.allclose(latents(load(*names, vram_limit=limit), **options), expected, atol=1e-5)


@pytest.mark.ledger("DS-36")
def test_insert_anything_changes_the_place_alone(load: Load, all_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxsmith.dialects.diffsynth.insert_anything.SIDE", 32)
    redux = "black-forest-labs/FLUX.1-Redux-dev"
    encoders = (f"{redux}:image_encoder/model.safetensors", f"{redux}:image_embedder/diffusion_pytorch_model.safetensors")
    pipe = load(*encoders, dit="black-forest-labs/FLUX.1-Fill-dev:flux1-fill-dev.safetensors")
    room, thing, place = shown(1, (96, 64)), shown(2, (40, 60)), Image.new("L", (96, 64))
    place.paste(255, (60, 30, 70, 40))
    shape = Image.new("L", (40, 60))
    shape.paste(255, (10, 10, 30, 50))
    given = {"insert_anything_source_image": room, "insert_anything_source_mask": place, "insert_anything_ref_image": thing}
    made = pipe(**{**SHORT, **given, "insert_anything_ref_mask": shape})
    assert made.size == room.size
    changed = torch.tensor([one != other for one, other in zip(made.get_flattened_data(), room.get_flattened_data(), strict=True)])  # type: ignore[attr-defined]
    rows, columns = changed.reshape(64, 96).nonzero(as_tuple=True)
    assert 15 < columns.min() < 60 < 70 < columns.max()
    assert columns.min() > 0
    with pytest.raises(ConfigError, match="insert_anything_ref_mask is missing"):
        pipe(**SHORT, **given)
    with pytest.raises(ConfigError, match=r"ref_mask has 96 x 64 pixels, its picture 40 x 60"):
        pipe(**SHORT, **given, insert_anything_ref_mask=place)
    with pytest.raises(ConfigError, match="insert_anything_ref_mask marks nothing"):
        pipe(**SHORT, **given, insert_anything_ref_mask=Image.new("L", (40, 60)))


def test_annotators_of_the_same_size() -> None:
    image = shown(1)
    assert Annotator("tile")(image).tobytes() == image.tobytes()
    edges = Annotator("canny", detect_resolution=64)(image)
    assert edges.size == image.size
    assert edges.tobytes() != Annotator("canny")(image).tobytes()
    assert Annotator("depth", skip_processor=True)(image).tobytes() == image.tobytes()
    with pytest.raises(ConfigError, match="no annotator is called sketch"):
        Annotator("sketch")
    download_models(["Annotators:Depth"])
    with pytest.raises(ConfigError, match="no list of files for FLUX"):
        download_models(["FLUX.1-dev"])


def test_blocks_are_compiled(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: seen.append(options))
    pipe = load()
    pipe.compile_pipeline(dynamic=False)
    assert seen == [{"mode": "default", "dynamic": False, "fullgraph": False}] * 2
    with pytest.raises(ConfigError, match="no network nothing"):
        pipe.compile_pipeline(compile_models=["nothing"])
    with pytest.raises(ConfigError, match="timestep LoRAs"):
        pipe.load_timestep_lora("x")
