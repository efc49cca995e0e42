"""Flex.2-preview: one model that draws, repaints, and follows edges."""

import options
from PIL import Image, ImageDraw

from fluxsmith.dialects.diffsynth import Annotator, FluxImagePipeline, ModelConfig

given = options.parse(__doc__)
pipe = FluxImagePipeline.from_pretrained(
    torch_dtype=given.dtype,
    device=given.device,
    model_configs=[
        ModelConfig(model_id="ostris/Flex.2-preview", origin_file_pattern="Flex.2-preview.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="text_encoder/model.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="text_encoder_2/*.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="ae.safetensors", **given.file),
    ],
    vram_limit=given.vram_limit,
)

side = given.side(1024)
size = {"height": side, "width": side, "num_inference_steps": given.steps(50), "embedded_guidance": 3.5}
first = pipe(prompt="a girl with long hair on a beach, red shirt", seed=0, **size)
first.save(given.out / "flex2_1.png")
mask = Image.new("RGB", (side, side))
ImageDraw.Draw(mask).rectangle((side // 3, side // 5, side * 2 // 3, side * 2 // 5), fill="white")
second = pipe(prompt="a girl with sunglasses on a beach", flex_inpaint_image=first, flex_inpaint_mask=mask, seed=4, **size)
second.save(given.out / "flex2_2.png")
edges = Annotator("canny")(first)
pipe(prompt="a girl on a beach, yellow shirt", flex_control_image=edges, seed=4, **size).save(given.out / "flex2_3.png")
