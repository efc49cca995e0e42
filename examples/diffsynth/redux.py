"""FLUX.1-Redux-dev: variations of a picture, without a prompt."""

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
        ModelConfig(model_id="black-forest-labs/FLUX.1-Redux-dev", origin_file_pattern="image_encoder/model.safetensors", **given.file),
        ModelConfig(
            model_id="black-forest-labs/FLUX.1-Redux-dev",
            origin_file_pattern="image_embedder/diffusion_pytorch_model.safetensors",
            **given.file,
        ),
    ],
    vram_limit=given.vram_limit,
)

size = {"height": given.side(1024), "width": given.side(1024), "num_inference_steps": given.steps(50)}
first = pipe(prompt="a friendly robot made of tin", seed=0, **size)
first.save(given.out / "redux_1.png")
pipe(flux_redux_image=first, embedded_guidance=2.5, seed=1, **size).save(given.out / "redux_2.png")
