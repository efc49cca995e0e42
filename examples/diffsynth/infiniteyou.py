"""InfiniteYou: a person from a portrait (`--face me.jpg`). Looking at faces needs insightface, facexlib and onnxruntime."""

import options
from PIL import Image

from fluxsmith.dialects.diffsynth import FluxImagePipeline, ModelConfig

given = options.parse(__doc__)
pipe = FluxImagePipeline.from_pretrained(
    torch_dtype=given.dtype,
    device=given.device,
    model_configs=[
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="flux1-dev.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="text_encoder/model.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="text_encoder_2/*.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="ae.safetensors", **given.file),
        ModelConfig(model_id="ByteDance/InfiniteYou", origin_file_pattern="infu_flux_v1.0/aes_stage2/image_proj_model.bin", **given.file),
        ModelConfig(
            model_id="ByteDance/InfiniteYou", origin_file_pattern="infu_flux_v1.0/aes_stage2/InfuseNetModel/*.safetensors", **given.file
        ),
    ],
    vram_limit=given.vram_limit,
)

if given.face is None:
    raise SystemExit("name a portrait: --face me.jpg")
image = pipe(
    prompt="a portrait in a library, warm light, cinematic",
    infinityou_id_image=Image.open(given.face).convert("RGB"),
    infinityou_guidance=1.0,
    embedded_guidance=3.5,
    seed=1,
    height=given.side(1024),
    width=given.side(1024),
    num_inference_steps=given.steps(50),
)
image.save(given.out / "infiniteyou.png")
