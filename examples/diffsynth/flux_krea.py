"""FLUX.1-Krea-dev: photographs with a guidance of 4.5."""

import options

from fluxsmith.dialects.diffsynth import FluxImagePipeline, ModelConfig

given = options.parse(__doc__)
pipe = FluxImagePipeline.from_pretrained(
    torch_dtype=given.dtype,
    device=given.device,
    model_configs=[
        ModelConfig(model_id="black-forest-labs/FLUX.1-Krea-dev", origin_file_pattern="flux1-krea-dev.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="text_encoder/model.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="text_encoder_2/*.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="ae.safetensors", **given.file),
    ],
    vram_limit=given.vram_limit,
)

image = pipe(
    prompt="a woman rides a bicycle through a park in autumn, candid photograph",
    embedded_guidance=4.5,
    seed=0,
    height=given.side(1024),
    width=given.side(1024),
    num_inference_steps=given.steps(30),
)
image.save(given.out / "flux_krea.png")
