"""Image towers: both published layouts, the numbers of the library they come from, pictures brought to their size, and wrong files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fluxsmith.errors import ModelFileError
from fluxsmith.io.safetensors import save_weights
from fluxsmith.models.fill import check_keys, meta, shapes_of
from fluxsmith.models.linear import Linear
from fluxsmith.models.vision_encoders import (
    ClipVision,
    SiglipVision,
    VisionParams,
    clip_pixels,
    load_clip_vision,
    load_siglip,
    siglip_pixels,
)

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
HEADS = {"fluxsmith.model": json.dumps({"num_attention_heads": 4})}


def picture() -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    return Image.fromarray(torch.randint(0, 256, (40, 60, 3), generator=generator, dtype=torch.uint8).numpy())


def siglip() -> SiglipVisionModel:
    torch.manual_seed(0)
    return SiglipVisionModel(SiglipVisionConfig(**SMALL)).eval()


def siglip_file(folder: Path, *, text: bool) -> Path:
    tensors = {f"vision_model.{key}": value for key, value in siglip().state_dict().items()}
    if text:
        tensors |= {"logit_scale": torch.ones(1), "text_model.embeddings.token_embedding.weight": torch.ones(4, 32)}
    save_weights(folder / "siglip.safetensors", tensors, HEADS)
    return folder / "siglip.safetensors"


@torch.no_grad()
@pytest.mark.ledger("DS-15")
@pytest.mark.ledger("DS-36")
@pytest.mark.parametrize("text", [False, True])
def test_siglip_with_and_without_its_text_half_gives_the_librarys_numbers(tmp_path: Path, text: bool) -> None:
    tower = load_siglip(siglip_file(tmp_path, text=text))
    assert all(isinstance(layer, Linear) for layer in tower.modules() if isinstance(layer, torch.nn.Linear))
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    pixels = siglip_pixels(picture(), 28)
    expected = siglip()(pixel_values=pixels)
    seen = tower(pixels)
    assert torch.allclose(seen.tokens, expected.last_hidden_state, atol=1e-6)
    assert torch.allclose(seen.pooled, expected.pooler_output, atol=1e-6)


@torch.no_grad()
def test_clip_gives_the_librarys_numbers_and_ignores_stored_position_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = CLIPVisionModelWithProjection(CLIPVisionConfig(**SMALL, projection_dim=24)).eval()
    tensors = dict(theirs.state_dict()) | {
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
        "text_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(4, 4),
    }
    save_weights(tmp_path / "clip.safetensors", tensors, HEADS)
    pixels = clip_pixels(picture(), 28)
    ours = load_clip_vision(tmp_path / "clip.safetensors")(pixels)
    assert (ours.shape, len(pixels)) == ((1, 24), 1)
    assert torch.allclose(ours, theirs(pixel_values=pixels).image_embeds, atol=1e-6)


def test_pictures_are_brought_to_size_as_the_published_preparation_does() -> None:
    image = picture()
    theirs = SiglipImageProcessorPil(size={"height": 28, "width": 28}, resample=3)(images=image, return_tensors="pt")["pixel_values"]
    assert torch.allclose(siglip_pixels(image, 28), theirs, atol=1e-6)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    theirs = processor(images=image, return_tensors="pt")["pixel_values"]
    assert torch.allclose(clip_pixels(image, 28), theirs, atol=1e-5)


@pytest.mark.parametrize("name", ["siglip-so400m-patch14-384", "redux-siglip-image-encoder"])
def test_published_files_fit(manifests_root: Path, name: str) -> None:
    stored = json.loads((manifests_root / f"{name}.json").read_text())["tensors"]
    shapes = {key: tuple(shape) for key, shape in stored.items() if key.startswith("vision_model.")}
    params = VisionParams.from_shapes(shapes)
    assert params == VisionParams(1152, 4304, 27, 16, 384, 14)
    tower = meta(lambda: SiglipVision(params))
    check_keys(shapes_of(tower.model), {SiglipVision.memory_key(key): shape for key, shape in shapes.items()}, name)


def test_the_published_clip_fits() -> None:
    """openai/clip-vit-large-patch14."""
    shapes = {
        "vision_model.embeddings.class_embedding": (1024,),
        "vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (257, 1024),
        "vision_model.encoder.layers.0.mlp.fc1.weight": (4096, 1024),
        "vision_model.encoder.layers.23.mlp.fc1.weight": (4096, 1024),
        "visual_projection.weight": (768, 1024),
    }
    params = VisionParams.from_shapes(shapes)
    assert params == VisionParams(1024, 4096, 24, 16, 224, 14, 768)
    assert shapes_of(meta(lambda: ClipVision(params)).model)["visual_projection.weight"] == (768, 1024)


def test_a_wrong_file_is_named_as_what_it_is(tmp_path: Path) -> None:
    path = siglip_file(tmp_path, text=False)
    with pytest.raises(ModelFileError, match="this is an image encoder.*CLIP image encoder with its projection was expected"):
        load_clip_vision(path)
    save_weights(tmp_path / "r.safetensors", {"redux_up.weight": torch.ones(2, 2)}, {})
    with pytest.raises(ModelFileError, match="Redux image embedder.*SigLIP image encoder was expected"):
        load_siglip(tmp_path / "r.safetensors")
