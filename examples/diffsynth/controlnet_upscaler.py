"""ControlNet Upscaler: a small picture at twice its size, decoded in tiles."""

import options

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
            model_id="jasperai/Flux.1-dev-Controlnet-Upscaler", origin_file_pattern="diffusion_pytorch_model.safetensors", **given.file
        ),
    ],
    vram_limit=given.vram_limit,
)

small, large = given.side(768), given.side(1536)
steps = given.steps(30)
first = pipe(prompt="a photograph of a cat, many details", height=small, width=small, seed=0, num_inference_steps=steps)
first.save(given.out / "upscaler_1.png")
first = first.resize((large, large))
second = pipe(
    prompt="a photograph of a cat, many details",
    controlnet_inputs=[ControlNetInput(image=first, scale=0.7)],
    input_image=first,
    denoising_strength=0.99,
    height=large,
    width=large,
    tiled=True,
    seed=1,
    num_inference_steps=steps,
)
second.save(given.out / "upscaler_2.png")
