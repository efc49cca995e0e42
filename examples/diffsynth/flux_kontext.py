"""FLUX.1-Kontext-dev: a picture is drawn, then changed by what is said about it; last, two pictures at once."""

import options

from fluxsmith.dialects.diffsynth import FluxImagePipeline, ModelConfig

given = options.parse(__doc__)
pipe = FluxImagePipeline.from_pretrained(
    torch_dtype=given.dtype,
    device=given.device,
    model_configs=[
        ModelConfig(model_id="black-forest-labs/FLUX.1-Kontext-dev", origin_file_pattern="flux1-kontext-dev.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="text_encoder/model.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="text_encoder_2/*.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="ae.safetensors", **given.file),
    ],
    vram_limit=given.vram_limit,
)

size = {"height": given.side(1024), "width": given.side(1024), "num_inference_steps": given.steps(30), "embedded_guidance": 2.5}
first = pipe(prompt="a red wooden boat on a lake", seed=1, **size)
first.save(given.out / "kontext_1.png")
winter = pipe(prompt="make it winter, the lake is frozen", kontext_images=first, seed=2, **size)
winter.save(given.out / "kontext_2.png")
both = pipe(prompt="both boats in one picture, side by side", kontext_images=[first, winter], seed=3, **size)
both.save(given.out / "kontext_3.png")
