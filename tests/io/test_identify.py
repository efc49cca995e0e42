"""Every published layout is named for what it is, however it is written; nothing depends on full-size numbers."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from header_files import header_only

from fluxsmith.errors import ModelFileError
from fluxsmith.io.identify import Identity, identify, require_role

Shapes = Mapping[str, tuple[int, ...]]

PUBLISHED = {
    "ae": ("flux1", "ae", "", "ldm"),
    "attrictrl-value-encoder": ("attrictrl", "value_encoder", "", "diffsynth"),
    "chroma": ("chroma", "dit", "chroma", "bfl"),
    "clip_l": ("clip", "clip_l", "", "hf"),
    "controlnet-inpainting-beta": ("flux1", "controlnet", "inpainting", "diffusers"),
    "controlnet-union-alpha": ("flux1", "controlnet", "union", "diffusers"),
    "controlnet-upscaler": ("flux1", "controlnet", "plain", "diffusers"),
    "flex2-preview": ("flex", "dit", "preview", "bfl"),
    "flux1-canny-dev": ("flux1", "dit", "canny-depth", "bfl"),
    "flux1-dev-aio-prefixed": ("flux1", "dit", "dev", "bfl"),
    "flux1-dev-diffsynth-native": ("flux1", "dit", "dev", "diffsynth"),
    "flux1-dev-diffusers-transformer": ("flux1", "dit", "dev", "diffusers"),
    "flux1-dev": ("flux1", "dit", "dev", "bfl"),
    "flux1-fill-dev": ("flux1", "dit", "fill", "bfl"),
    "flux1-kontext-dev": ("flux1", "dit", "dev", "bfl"),
    "flux1-krea-dev": ("flux1", "dit", "dev", "bfl"),
    "flux1-schnell": ("flux1", "dit", "schnell", "bfl"),
    "infiniteyou-image-proj": ("infiniteyou", "face_projector", "", "infiniteyou"),
    "infiniteyou-infusenet": ("flux1", "controlnet", "plain", "diffusers"),
    "ip-adapter": ("flux1", "ip_adapter", "instantx", "instantx"),
    "lora-encoder": ("flux1", "lora_encoder", "", "diffsynth"),
    "lora-fusion-patcher": ("flux1", "lora_fusion", "", "diffsynth"),
    "nexus-gen-v2-ar": ("nexus_gen", "language_model", "autoregressive", "hf"),
    "nexus-gen-v2-edit-decoder": ("nexus_gen", "dit", "edit", "nexus_gen"),
    "nexus-gen-v2-generation-decoder": ("nexus_gen", "dit", "generation", "nexus_gen"),
    "qwen2.5-vl-7b-instruct": ("qwen2_5_vl", "language_model", "", "hf"),
    "redux-image-embedder": ("flux1", "image_embedder", "redux", "bfl"),
    "redux-siglip-image-encoder": ("siglip", "image_encoder", "vision", "hf"),
    "siglip-so400m-patch14-384": ("siglip", "image_encoder", "text and vision", "hf"),
    "step1x-edit": ("step1x", "dit", "edit", "bfl"),
    "t5xxl": ("t5", "t5xxl", "", "hf"),
}
TINY = {
    "ae-tiny/weights": ("ae", "", "ldm"),
    "taef1-tiny/weights": ("tiny_ae", "", "diffusers"),
    "taef1-tiny/taef1_decoder": ("tiny_ae", "decoder only", "sequential"),
    "taef1-tiny/taef1_encoder": ("tiny_ae", "encoder only", "sequential"),
    "clip_l-tiny/weights": ("clip_l", "", "hf"),
    "t5-tiny/weights": ("t5xxl", "", "hf"),
    "flux-dev-tiny/weights": ("dit", "dev", "bfl"),
    "flux-dev-small/weights": ("dit", "dev", "bfl"),
    "flux-schnell-tiny/weights": ("dit", "schnell", "bfl"),
    "chroma-tiny/weights": ("dit", "chroma", "bfl"),
    "fill-tiny/weights": ("dit", "fill", "bfl"),
    "flex2-tiny/weights": ("dit", "preview", "bfl"),
    "structure-tiny/weights": ("dit", "canny-depth", "bfl"),
    "step1x-tiny/weights": ("dit", "edit", "bfl"),
    "nexus-gen-tiny/generation_decoder": ("dit", "generation", "nexus_gen"),
    "controlnet-tiny/weights": ("controlnet", "plain", "diffusers"),
    "controlnet-tiny/weights_union": ("controlnet", "union", "diffusers"),
    "controlnet-sdscripts-tiny/weights": ("controlnet", "pixels", "bfl"),
    "infiniteyou-tiny/image_proj": ("face_projector", "", "infiniteyou"),
    "ip-adapter-xlabs-tiny/weights": ("ip_adapter", "xlabs", "xlabs"),
    "ip-adapter-instantx-tiny/weights": ("ip_adapter", "instantx", "instantx"),
    "redux-tiny/weights": ("image_embedder", "redux", "bfl"),
    "attrictrl-tiny/detail": ("value_encoder", "", "diffsynth"),
    "lora-encoder-tiny/weights": ("lora_encoder", "", "diffsynth"),
    "lora-fusion-tiny/weights": ("lora_fusion", "", "diffsynth"),
    "text-encoder-lora-tiny/kohya": ("lora", "lora", "kohya"),
    "text-encoder-lora-tiny/diffusers_clip_only": ("lora", "lora", "peft"),
    "flux-dev-lora-tiny/kohya": ("lora", "lora", "kohya"),
    "flux-dev-lora-tiny/diffusers_peft": ("lora", "lora", "peft"),
    "flux-dev-lora-tiny/comfy_bfl_peft": ("lora", "lora", "comfy_bfl"),
    "flux-dev-lora-tiny/bfl_peft_base_model": ("lora", "lora", "bfl_peft"),
    "flux-dev-lora-tiny/onetrainer_lora_transformer": ("lora", "lora", "onetrainer"),
    "flux-dev-lora-tiny/diffsynth": ("lora", "lora", "diffsynth"),
    "flux-dev-lora-tiny/xlabs": ("lora", "lora", "xlabs"),
    "flux-dev-lora-tiny/bfl_control": ("lora", "control", "bfl_control"),
    "flux-dev-lora-tiny/kohya_oft": ("lora", "oft", "kohya"),
    "flux-dev-lora-tiny/ai_toolkit_lokr": ("lora", "lokr", "peft"),
    "flux-dev-lora-tiny/lycoris_prefix_diffusers_lokr": ("lora", "lokr", "lycoris"),
    "flux-dev-lora-tiny/lycoris_loha": ("lora", "loha", "kohya"),
    "flux-dev-lora-tiny/lycoris_dora": ("lora", "dora", "kohya"),
    "flux-dev-lora-tiny/lycoris_ia3": ("lora", "ia3", "kohya"),
    "flux-dev-lora-tiny/lycoris_glora": ("lora", "glora", "kohya"),
    "flux-dev-lora-tiny/lycoris_boft": ("lora", "boft", "kohya"),
    "flux-dev-lora-tiny/lycoris_diag_oft": ("lora", "diag-oft", "kohya"),
    "flux-dev-lora-tiny/lycoris_full_diff": ("lora", "full", "kohya"),
    "flux-dev-lora-tiny/peft_dora": ("lora", "dora", "peft"),
    "flux-dev-lora-tiny/kohya_split_qkv": ("lora", "lora", "kohya"),
    "flux-dev-lora-tiny/diffusers_peft_alpha_metadata": ("lora", "lora", "peft"),
    "flux-dev-lora-tiny/ai_toolkit": ("lora", "lora", "peft"),
    "flux-dev-lora-tiny/comfy_bfl_down_up": ("lora", "lora", "comfy_bfl"),
    "flux-dev-lora-tiny/xlabs_double_only": ("lora", "lora", "xlabs"),
    "flux-dev-lora-tiny/xlabs_as_kohya": ("lora", "lora", "kohya"),
    "flux-dev-lora-tiny/lycoris_lokr": ("lora", "lokr", "kohya"),
    "flux-dev-lora-tiny/lycoris_lokr_full": ("lora", "lokr", "kohya"),
    "flux-dev-lora-tiny/lycoris_lokr_both": ("lora", "lokr", "kohya"),
    "flux-dev-lora-tiny/lycoris_dora_in": ("lora", "dora", "kohya"),
    "flux-dev-lora-tiny/lycoris_dokr": ("lora", "dora", "kohya"),
    "flux-dev-lora-tiny/lycoris_ia3_input": ("lora", "ia3", "kohya"),
    "flux-dev-lora-tiny/lycoris_diag_oft_constraint_rescale": ("lora", "diag-oft", "kohya"),
    "diffsynth-lora-tiny/raw": ("lora", "lora", "diffsynth"),
    "diffsynth-lora-tiny/aligned": ("lora", "lora", "kohya"),
}


@pytest.fixture(scope="module")
def manifests(manifests_root: Path) -> dict[str, Shapes]:
    return {path.stem: json.loads(path.read_text())["tensors"] for path in manifests_root.glob("*.json")}


def told(identity: Identity) -> tuple[str, str, str, str]:
    return identity.family, identity.role, identity.variant, identity.key_style


def test_no_published_layout_is_left_out(manifests: dict[str, Shapes]) -> None:
    assert set(manifests) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("form", ["whole", "sft", "sharded", "float8"])
def test_published_layouts(tmp_path: Path, manifests: dict[str, Shapes], name: str, form: str) -> None:
    shapes = manifests[name]
    if form == "sharded":
        items = list(shapes.items())
        header_only(tmp_path / "m-00001-of-00002.safetensors", dict(items[::2]))
        path = header_only(tmp_path / "m-00002-of-00002.safetensors", dict(items[1::2]))
    elif form == "float8":
        path = header_only(tmp_path / "m.safetensors", shapes, "F8_E4M3", 8)
    else:
        path = header_only(tmp_path / f"m.{'sft' if form == 'sft' else 'safetensors'}", shapes)
    found = identify(path)
    assert told(found) == PUBLISHED[name]
    assert found.problems == ()
    assert found.sizes["tensors"] == len(shapes)
    assert found.path == path


def test_krea_and_kontext_are_said_to_share_dev(tmp_path: Path, manifests: dict[str, Shapes]) -> None:
    for name in ("flux1-dev", "flux1-krea-dev", "flux1-kontext-dev"):
        assert "Krea and Kontext" in identify(header_only(tmp_path / "m.safetensors", manifests[name])).notes[0]


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_are_told_by_structure(fixtures_root: Path, name: str) -> None:
    found = identify(fixtures_root / f"{name}.safetensors")
    assert (found.role, found.variant, found.key_style) == TINY[name]
    assert found.problems == ()


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "transformer.", "pipe.dit."])
@pytest.mark.parametrize("name", ["flux1-dev", "flux1-dev-diffusers-transformer", "chroma"])
def test_prefixed_transformers(tmp_path: Path, manifests: dict[str, Shapes], prefix: str, name: str) -> None:
    found = identify(header_only(tmp_path / "m.safetensors", {prefix + key: shape for key, shape in manifests[name].items()}))
    assert told(found) == PUBLISHED[name]
    assert (found.prefix, found.problems) == (prefix, ())


def all_in_one(manifests: dict[str, Shapes], *roles: str) -> dict[str, tuple[int, ...]]:
    source = {
        "dit": ("model.diffusion_model.", "flux1-dev"),
        "clip_l": ("text_encoders.clip_l.transformer.", "clip_l"),
        "t5xxl": ("text_encoders.t5xxl.transformer.", "t5xxl"),
        "ae": ("vae.", "ae"),
    }
    return {source[role][0] + key: shape for role in roles for key, shape in manifests[source[role][1]].items()}


def test_all_in_one_checkpoint(tmp_path: Path, manifests: dict[str, Shapes]) -> None:
    path = header_only(tmp_path / "m.safetensors", all_in_one(manifests, "dit", "clip_l", "t5xxl", "ae"))
    found = identify(path)
    assert (found.role, found.variant, found.problems) == ("checkpoint", "dev", ())
    assert found.sizes["roles"] == {
        "dit": "model.diffusion_model.",
        "clip_l": "text_encoders.clip_l.transformer.",
        "t5xxl": "text_encoders.t5xxl.transformer.",
        "ae": "vae.",
    }
    for role in ("dit", "clip_l", "t5xxl", "ae"):
        assert role in require_role(path, role).roles()
    bundle = header_only(tmp_path / "t.safetensors", all_in_one(manifests, "clip_l", "t5xxl"))
    assert identify(bundle).role == "text_encoders_bundle"
    with pytest.raises(ModelFileError, match="bundle of text encoders, a FLUX transformer was expected"):
        require_role(bundle, "dit")


@pytest.mark.ledger("FS-06")
def test_wrong_role_names_both(tmp_path: Path, manifests: dict[str, Shapes]) -> None:
    t5 = header_only(tmp_path / "t5xxl_fp16.safetensors", manifests["t5xxl"])
    with pytest.raises(ModelFileError) as caught:
        require_role(t5, "clip_l")
    message = f"clip_l = {t5}: this is a T5-XXL text encoder (encoder.block.*, shared.weight), CLIP-L was expected (text_model.*)"
    assert message in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.ledger("FS-06")
def test_every_role_refuses_every_other(tmp_path: Path, manifests: dict[str, Shapes], fixtures_root: Path) -> None:
    files = {
        "dit": header_only(tmp_path / "dit.safetensors", manifests["flux1-dev"]),
        "clip_l": header_only(tmp_path / "clip.safetensors", manifests["clip_l"]),
        "t5xxl": header_only(tmp_path / "t5.safetensors", manifests["t5xxl"]),
        "ae": header_only(tmp_path / "ae.safetensors", manifests["ae"]),
        "lora": fixtures_root / "flux-dev-lora-tiny/kohya.safetensors",
        "controlnet": header_only(tmp_path / "cn.safetensors", manifests["controlnet-upscaler"]),
    }
    for role in files:
        for given, path in files.items():
            if given == role:
                assert require_role(path, role).role == role
            else:
                with pytest.raises(ModelFileError, match="was expected"):
                    require_role(path, role)


def test_tiny_autoencoder_serves_as_one(fixtures_root: Path) -> None:
    assert require_role(fixtures_root / "taef1-tiny/weights.safetensors", "ae").role == "tiny_ae"


def problems(tmp_path: Path, shapes: Shapes, role: str, **settings: object) -> str:
    path = header_only(tmp_path / "m.safetensors", shapes, **settings)  # type: ignore[arg-type]
    found = identify(path)
    assert found.role == role
    return "; ".join(found.problems)


def test_block_gap_and_missing_tensors(tmp_path: Path, manifests: dict[str, Shapes]) -> None:
    dev = manifests["flux1-dev"]
    gap = {key: shape for key, shape in dev.items() if not key.startswith("double_blocks.7.")}
    assert "double_blocks.* has no block 7" in problems(tmp_path, gap, "dit")
    with pytest.raises(ModelFileError, match="no block 7"):
        require_role(header_only(tmp_path / "m.safetensors", gap), "dit")
    part = {key: shape for key, shape in dev.items() if key not in ("txt_in.bias", "single_blocks.3.linear2.weight")}
    assert problems(tmp_path, part, "dit") == "2 tensors are missing: txt_in.bias, single_blocks.3.linear2.weight"
    foreign = dict(manifests["flux1-dev-diffusers-transformer"])
    del foreign["transformer_blocks.4.attn.to_k.weight"]
    assert problems(tmp_path, foreign, "dit") == "1 tensors are missing: transformer_blocks.4.attn.to_k.weight"


def test_scaled_and_quantised_are_named_and_refused(tmp_path: Path, manifests: dict[str, Shapes]) -> None:
    dev = manifests["flux1-dev"]
    scaled = dict(dev) | {"scaled_fp8": (0,), "img_in.scale_weight": (1,)}
    assert problems(tmp_path, scaled, "dit") == ""  # read as what it stands for
    scaled = dict(dev) | {"scaled_fp8": (0,), "img_in.scale_weight": (5,)}
    assert "scaled 8-bit (2 scale tensors" in problems(tmp_path, scaled, "dit")
    nf4 = dict(dev) | {"img_in.weight.absmax": (12,), "img_in.weight.quant_map": (16,)}
    assert "weights are quantised" in problems(tmp_path, nf4, "dit")
    assert "integers without scales" in problems(tmp_path, dev, "dit", dtype="I8", bits=8)
    with pytest.raises(ModelFileError, match="get the bf16 or plain fp8 file"):
        require_role(header_only(tmp_path / "m.safetensors", scaled), "dit")
    t5 = dict(manifests["t5xxl"]) | {"scaled_fp8": (2,)}
    assert "scaled 8-bit" in problems(tmp_path, t5, "t5xxl")


def test_an_extra_tensor_is_reported_but_breaks_nothing(tmp_path: Path, manifests: dict[str, Shapes]) -> None:
    path = header_only(tmp_path / "m.safetensors", dict(manifests["flux1-dev"]) | {"extra.thing": (3,)})
    assert require_role(path, "dit").problems == ("1 unknown tensors: extra.thing",)


def test_text_encoder_layouts(tmp_path: Path, manifests: dict[str, Shapes]) -> None:
    clip = {key.removeprefix("text_model."): shape for key, shape in manifests["clip_l"].items()}
    assert problems(tmp_path, clip, "clip_l") == ""
    extra = dict(manifests["clip_l"]) | {
        "text_model.embeddings.position_ids": (1, 77),
        "logit_scale": (),
        "text_projection.weight": (768, 768),
    }
    assert problems(tmp_path, extra, "clip_l") == ""
    big = {key: tuple(1280 if side == 768 else side for side in shape) for key, shape in manifests["clip_l"].items()}
    assert "CLIP-G" in problems(tmp_path, big, "clip_l")
    t5 = dict(manifests["t5xxl"])
    table = t5.pop("shared.weight")
    assert "missing: shared.weight" in problems(tmp_path, t5, "t5xxl")
    assert problems(tmp_path, t5 | {"encoder.embed_tokens.weight": table}, "t5xxl") == ""
    assert problems(tmp_path, t5 | {"encoder.embed_tokens.weight": table, "shared.weight": table}, "t5xxl") == ""


def test_autoencoder_of_another_model(tmp_path: Path, manifests: dict[str, Shapes]) -> None:
    ae = dict(manifests["ae"]) | {"decoder.conv_in.weight": (512, 4, 3, 3)}
    assert "4 latent channels" in problems(tmp_path, ae, "ae")


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "Stable Diffusion U-Net"),
        ("joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("double_stream_modulation_img.lin.weight", "FLUX.2"),
        ("something.else", "keys: something.else"),
    ],
)
def test_other_models_are_unknown_with_a_guess(tmp_path: Path, key: str, title: str) -> None:
    path = header_only(tmp_path / "m.safetensors", {key: (4, 4)})
    assert identify(path).role == "unknown"
    with pytest.raises(ModelFileError, match=title):
        require_role(path, "dit")


def test_sdxl_checkpoint_is_no_flux_checkpoint(tmp_path: Path) -> None:
    shapes = {"model.diffusion_model.input_blocks.0.0.weight": (4, 4), "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3)}
    assert "U-Net" in identify(header_only(tmp_path / "m.safetensors", shapes)).notes[0]


def test_lora_of_another_model(tmp_path: Path) -> None:
    shapes = {"lora_unet_down_blocks_0_attn.lora_down.weight": (4, 8), "lora_unet_down_blocks_0_attn.lora_up.weight": (8, 4)}
    found = identify(header_only(tmp_path / "m.safetensors", shapes))
    assert (found.family, found.role) == ("unknown", "lora")
    assert "U-Net" in found.problems[0]


def test_empty_file(tmp_path: Path) -> None:
    assert identify(header_only(tmp_path / "m.safetensors", {})).describe() == "no model that fluxsmith knows (it holds no tensor)"


def test_every_adapter_file_of_the_fixtures_is_in_the_table(fixtures_root: Path) -> None:
    folders = ("flux-dev-lora-tiny", "text-encoder-lora-tiny", "diffsynth-lora-tiny")
    files = {f"{folder}/{path.stem}" for folder in folders for path in (fixtures_root / folder).glob("*.safetensors")}
    tensors = {f"{folder}/{name}" for folder in folders for name in ("inputs", "expected")}
    assert files - tensors == {name for name in TINY if name.split("/")[0] in folders}
