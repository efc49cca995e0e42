"""IP-Adapter: the look of one picture on another subject."""

import options

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
        ModelConfig(model_id="InstantX/FLUX.1-dev-IP-Adapter", origin_file_pattern="ip-adapter.bin", **given.file),
        ModelConfig(model_id="google/siglip-so400m-patch14-384", origin_file_pattern="model.safetensors", **given.file),
    ],
    vram_limit=given.vram_limit,
)

size = {"height": given.side(1280), "width": given.side(960), "num_inference_steps": given.steps(30)}
style = pipe(prompt="a rabbit in a garden, colourful flowers, gouache", seed=42, **size)
style.save(given.out / "ip_adapter_style.png")
image = pipe(prompt="a small pig", ipadapter_images=[style], ipadapter_scale=0.7, seed=42, **size)
image.save(given.out / "ip_adapter.png")
