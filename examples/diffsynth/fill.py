"""FLUX.1-Fill-dev: what is white in the mask is drawn anew."""

import options
from PIL import Image, ImageDraw

from fluxsmith.dialects.diffsynth import FluxImagePipeline, ModelConfig

given = options.parse(__doc__)
pipe = FluxImagePipeline.from_pretrained(
    torch_dtype=given.dtype,
    device=given.device,
    model_configs=[
        ModelConfig(model_id="black-forest-labs/FLUX.1-Fill-dev", origin_file_pattern="flux1-fill-dev.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-Fill-dev", origin_file_pattern="text_encoder/model.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-Fill-dev", origin_file_pattern="text_encoder_2/*.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-Fill-dev", origin_file_pattern="ae.safetensors", **given.file),
    ],
    vram_limit=given.vram_limit,
)

side = given.side(1024)
picture = Image.new("RGB", (side, side), "wheat")
ImageDraw.Draw(picture).rectangle((side // 4, side // 2, side * 3 // 4, side), fill="saddlebrown")
mask = Image.new("L", (side, side))
ImageDraw.Draw(mask).rectangle((side * 3 // 8, side // 4, side * 5 // 8, side // 2), fill=255)
image = pipe(
    prompt="a white paper cup on a table",
    flux_fill_image=picture,
    flux_fill_mask=mask,
    embedded_guidance=30.0,
    seed=0,
    height=side,
    width=side,
    num_inference_steps=given.steps(50),
)
image.save(given.out / "fill.png")
