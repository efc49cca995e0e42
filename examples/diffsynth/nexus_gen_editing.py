"""Nexus-GenV2: a picture changed as the prompt says."""

import options
from PIL import Image, ImageDraw

from fluxsmith.dialects.diffsynth import FluxImagePipeline, ModelConfig

given = options.parse(__doc__)
pipe = FluxImagePipeline.from_pretrained(
    torch_dtype=given.dtype,
    device=given.device,
    model_configs=[
        ModelConfig(model_id="DiffSynth-Studio/Nexus-GenV2", origin_file_pattern="model*.safetensors", **given.file),
        ModelConfig(model_id="DiffSynth-Studio/Nexus-GenV2", origin_file_pattern="edit_decoder.bin", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="text_encoder/model.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="text_encoder_2/*.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="ae.safetensors", **given.file),
    ],
    nexus_gen_processor_config=ModelConfig(model_id="DiffSynth-Studio/Nexus-GenV2", origin_file_pattern="processor/", **given.file),
    vram_limit=given.vram_limit,
)

side = given.side(512)
picture = Image.new("RGB", (side, side), "skyblue")
ImageDraw.Draw(picture).ellipse((side // 4, side // 4, side * 3 // 4, side * 3 // 4), fill="orange")
image = pipe(
    prompt="Add a crown.",
    nexus_gen_reference_image=picture,
    cfg_scale=2.0,
    seed=42,
    height=side,
    width=side,
    num_inference_steps=given.steps(50),
)
image.save(given.out / "nexus_gen_edit.png")
