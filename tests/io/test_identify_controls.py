"""Control models as others write them: fine-tunes of DiffSynth-Studio, newer layouts, two models in one file; and their tensors by role."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from fluxsmith.io.canonical import canonical
from fluxsmith.io.identify import identify, require_role
from fluxsmith.io.identity import Identity
from fluxsmith.io.keymaps import MAPS
from fluxsmith.io.safetensors import open_weights, save_weights

Shapes = Mapping[str, tuple[int, ...]]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with open_weights(path) as weights:
        return {name: weights.tensor(name) for name in weights}


def written(path: Path, tensors: Mapping[str, torch.Tensor | tuple[int, ...]]) -> Path:
    save_weights(path, {name: made if isinstance(made, torch.Tensor) else torch.zeros(made) for name, made in tensors.items()})
    return path


def told(identity: Identity) -> tuple[str, str, str]:
    return identity.role, identity.variant, identity.key_style


def read(path: Path, role: str) -> dict[str, torch.Tensor]:
    with open_weights(path) as weights:
        return {key: source.read() for key, source in canonical(weights, require_role(path, role), role).items()}


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


CONTROLS = {
    "ip-adapter-instantx-tiny/weights": "ip_adapter",
    "redux-tiny/weights": "image_embedder",
    "infiniteyou-tiny/image_proj": "face_projector",
    "attrictrl-tiny/detail": "value_encoder",
    "lora-encoder-tiny/weights": "lora_encoder",
    "lora-fusion-tiny/weights": "lora_fusion",
}


@pytest.mark.parametrize("name", CONTROLS)
def test_tensors_of_a_role_come_without_prefixes(fixtures_root: Path, name: str) -> None:
    path, role = fixtures_root / f"{name}.safetensors", CONTROLS[name]
    expected = {key.removeprefix("image_proj.") if role == "face_projector" else key: value for key, value in tensors_of(path).items()}
    assert same(read(path, role), expected)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("attrictrl-tiny/detail", "pipe.value_controller.encoders.0."),
        ("attrictrl-tiny/detail", "encoders.0."),
        ("lora-encoder-tiny/weights", "pipe.lora_encoder."),
        ("ip-adapter-instantx-tiny/weights", "pipe.ipadapter."),
    ],
)
def test_trained_under_a_place_of_the_pipeline(tmp_path: Path, fixtures_root: Path, name: str, prefix: str) -> None:
    bare = fixtures_root / f"{name}.safetensors"
    path = written(tmp_path / "m.safetensors", {prefix + key: value for key, value in tensors_of(bare).items()})
    found = identify(path)
    assert (told(found), found.prefix) == (told(identify(bare)), prefix)
    assert same(read(path, found.role), read(bare, found.role))


def native(fixtures_root: Path, file: str) -> dict[str, torch.Tensor]:
    """A diffusers ControlNet in DiffSynth-Studio's own names."""
    tensors = tensors_of(fixtures_root / file)
    foreign = read(fixtures_root / file, "controlnet")
    made = {name: value for name, value in tensors.items() if name.startswith("controlnet_")}
    for key, value in foreign.items():
        recipe = MAPS["diffsynth"].recipe(key)
        made |= {recipe.keys[0]: value} if recipe else {}
    return made


@pytest.mark.parametrize("prefix", ["", "pipe.controlnet.models.0.", "controlnet.models.0."])
def test_controlnet_that_diffsynth_trained(tmp_path: Path, fixtures_root: Path, prefix: str) -> None:
    path = written(
        tmp_path / "m.safetensors",
        {prefix + key: value for key, value in native(fixtures_root, "controlnet-tiny/weights.safetensors").items()},
    )
    found = identify(path)
    assert (told(found), found.prefix) == (("controlnet", "plain", "diffsynth"), prefix)
    assert same(read(path, "controlnet"), read(fixtures_root / "controlnet-tiny/weights.safetensors", "controlnet"))


def test_infiniteyou_trained_whole(tmp_path: Path, fixtures_root: Path) -> None:
    """DiffSynth-Studio saves ControlNet and projector in one file."""
    net = native(fixtures_root, "infiniteyou-tiny/infusenet.safetensors")
    projector = read(fixtures_root / "infiniteyou-tiny/image_proj.safetensors", "face_projector")
    tensors = {f"controlnet.models.0.{key}": value for key, value in net.items()}
    path = written(tmp_path / "m.safetensors", tensors | {f"image_proj_model.{key}": value for key, value in projector.items()})
    assert (identify(path).role, identify(path).parts()) == ("controlnet", {"face_projector": "image_proj_model."})
    assert same(read(path, "face_projector"), projector)
    assert same(read(path, "controlnet"), read(fixtures_root / "infiniteyou-tiny/infusenet.safetensors", "controlnet"))


def test_ip_adapter_in_diffsynths_names(tmp_path: Path, fixtures_root: Path) -> None:
    tensors = tensors_of(fixtures_root / "ip-adapter-instantx-tiny/weights.safetensors")
    renamed = {key.replace("ip_adapter.", "ipadapter_modules.", 1): value for key, value in tensors.items()}
    path = written(tmp_path / "m.safetensors", renamed)
    assert told(identify(path)) == ("ip_adapter", "instantx", "diffsynth")
    assert same(read(path, "ip_adapter"), tensors)


@pytest.mark.parametrize("prefix", ["", "pipe.dit."])
def test_full_fine_tune_of_diffsynth_is_not_taken_for_nexus_gen(tmp_path: Path, fixtures_root: Path, prefix: str) -> None:
    """Nexus-Gen's files have the same names, with the halves of one layer exchanged: its adapters tell them apart."""
    bfl = tensors_of(fixtures_root / "flux-dev-tiny/weights.safetensors")
    made = {prefix + recipe.keys[0]: value for key, value in bfl.items() if (recipe := MAPS["diffsynth"].recipe(key))}
    path = written(tmp_path / "m.safetensors", made)
    assert told(identify(path)) == ("dit", "dev", "diffsynth")
    assert same(read(path, "dit"), bfl)


@pytest.mark.parametrize(
    ("file", "role", "start"),
    [
        ("step1x-tiny/weights", "connector", "connector."),
        ("nexus-gen-tiny/generation_decoder", "generation_adapter", "adapter."),
        ("nexus-gen-tiny/edit_decoder", "editing_adapter", "embedding_merger."),
    ],
)
def test_second_model_in_a_file(fixtures_root: Path, file: str, role: str, start: str) -> None:
    path = fixtures_root / f"{file}.safetensors"
    inside = {key.removeprefix(start): value for key, value in tensors_of(path).items() if key.startswith(start)}
    assert same(read(path, role), inside)


VISION = {"encoder.layers.0.mlp.fc1.weight": (8, 4), "embeddings.patch_embedding.weight": (4, 3, 2, 2), "embeddings.position_ids": (1, 9)}
TEXT = {
    "text_model.embeddings.token_embedding.weight": (8, 4),
    "text_model.embeddings.position_embedding.weight": (8, 4),
    "text_model.final_layer_norm.weight": (4,),
    "text_model.encoder.layers.0.self_attn.q_proj.weight": (4, 4),
}


@pytest.mark.parametrize("root", ["vision_model.", ""])
@pytest.mark.parametrize("clip", [True, False])
def test_image_towers(tmp_path: Path, root: str, clip: bool) -> None:
    extra = {f"{root}embeddings.class_embedding": (4,), "visual_projection.weight": (2, 4)} if clip else {}
    path = written(tmp_path / "m.safetensors", {root + name: shape for name, shape in VISION.items()} | extra)
    found = identify(path)
    assert (found.family, told(found)) == (
        "clip" if clip else "siglip",
        ("image_encoder", "vision", "hf" if root else "hf without vision_model"),
    )
    kept = {"vision_model.encoder.layers.0.mlp.fc1.weight", "vision_model.embeddings.patch_embedding.weight"}
    assert read(path, "image_encoder").keys() == kept | (
        {"vision_model.embeddings.class_embedding", "visual_projection.weight"} if clip else set()
    )


def test_a_whole_clip_is_text_encoder_and_image_encoder(tmp_path: Path) -> None:
    vision = {f"vision_model.{name}": shape for name, shape in VISION.items()} | {"vision_model.embeddings.class_embedding": (4,)}
    path = written(tmp_path / "m.safetensors", TEXT | vision | {"visual_projection.weight": (2, 4), "logit_scale": ()})
    assert told(identify(path)) == ("clip_l", "with vision tower", "hf")
    assert all(name.startswith("text_model.") for name in read(path, "clip_l"))
    assert all(name.startswith(("vision_model.", "visual_projection.")) for name in read(path, "image_encoder"))


def test_siglip_with_its_text_half_gives_the_image_half(tmp_path: Path) -> None:
    path = written(tmp_path / "m.safetensors", TEXT | {f"vision_model.{name}": shape for name, shape in VISION.items()})
    assert told(identify(path)) == ("image_encoder", "text and vision", "hf")
    assert all(name.startswith("vision_model.") for name in read(path, "image_encoder"))


@pytest.mark.parametrize("nexus", [True, False])
def test_language_model_in_the_layout_of_transformers_5(tmp_path: Path, nexus: bool) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "model.visual.patch_embed.proj.weight": (4, 3, 2, 2, 2),
        "model.language_model.layers.0.input_layernorm.weight": (4,),
        "model.language_model.embed_tokens.weight": (8, 4),
        "lm_head.weight": (8, 4),
    } | ({"vision_head.weight": (4, 4)} if nexus else {})
    path = written(tmp_path / "m.safetensors", shapes)
    assert identify(path).family == ("nexus_gen" if nexus else "qwen2_5_vl")
    expected = {"visual.patch_embed.proj.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight", "lm_head.weight"}
    assert read(path, "language_model").keys() == expected | ({"vision_head.weight"} if nexus else set())


def test_adapter_that_changes_with_time(tmp_path: Path) -> None:
    start = "base_model.model.transformer_blocks.0.attn.to_q"
    shapes = {f"{start}.lora_A.weight": (4, 8), f"{start}.lora_B.weight": (8, 4), f"{start}.lora_time_gamma.weight": (4, 256)}
    found = identify(written(tmp_path / "m.safetensors", shapes))
    assert (found.role, found.variant) == ("lora", "timestep")


def test_sizes_tell_modes_and_condition_channels(fixtures_root: Path) -> None:
    folder = fixtures_root / "controlnet-variants-tiny"
    modes = json.loads((folder / "meta.json").read_text())
    union, inpaint, upscaler = (identify(folder / f"{name}.safetensors") for name in ("union", "inpaint", "upscaler"))
    assert (union.variant, inpaint.variant, upscaler.variant) == ("union", "inpainting", "plain")
    assert modes
    assert union.sizes["modes"] > 1
    assert inpaint.sizes["condition_channels"] == upscaler.sizes["condition_channels"] + 4


def test_fine_tune_with_other_blocks_and_extra_keys(tmp_path: Path, fixtures_root: Path) -> None:
    tensors = tensors_of(fixtures_root / "flux-dev-tiny/weights.safetensors")
    last = max(int(key.split(".")[1]) for key in tensors if key.startswith("single_blocks."))
    shorter = {key: value for key, value in tensors.items() if not key.startswith(f"single_blocks.{last}.")} | {
        "training_step": torch.zeros(1)
    }
    found = require_role(written(tmp_path / "m.safetensors", shorter), "dit")
    assert (found.variant, found.sizes["single_blocks"]) == ("dev", last)
    assert found.problems == ("1 unknown tensors: training_step",)
