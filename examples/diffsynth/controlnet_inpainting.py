"""ControlNet Inpainting-Beta: what is white in the mask is drawn anew."""

import options
from PIL import Image, ImageDraw

from fluxsmith.dialects.diffsynth import ControlNetInput, FluxImagePipeline, ModelConfig

given = options.parse(__doc__)
pipe = FluxImagePipeline.from_pretrained(
    torch_dtype=given.dtype,
    device=given.device,
    model_configs=[
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="flux1-dev.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="text_encoder/model.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="text_encoder_2/*.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="ae.safetensors", **given.file),
        ModelConfig(
            model_id="alimama-creative/FLUX.1-dev-Controlnet-Inpainting-Beta",
            origin_file_pattern="diffusion_pytorch_model.safetensors",
            **given.file,
        ),
    ],
    vram_limit=given.vram_limit,
)

side = given.side(1024)
size = {"height": side, "width": side, "num_inference_steps": given.steps(30)}
first = pipe(prompt="a cat on a chair", seed=8, **size)
first.save(given.out / "inpainting_1.png")
mask = Image.new("RGB", (side, side))
ImageDraw.Draw(mask).rectangle((side // 3, side // 10, side * 2 // 3, side // 3), fill="white")
inputs = [ControlNetInput(image=first, inpaint_mask=mask, scale=0.9)]
pipe(prompt="a cat on a chair, with a small straw hat", controlnet_inputs=inputs, seed=9, **size).save(given.out / "inpainting_2.png")
