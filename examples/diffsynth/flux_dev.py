"""FLUX.1-dev: text to image, without and with a negative prompt."""

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
    ],
    vram_limit=given.vram_limit,
)

prompt = "a lighthouse on a cliff above a stormy sea at dusk, its beam in the rain, oil painting, thick strokes"
image = pipe(prompt=prompt, seed=0, height=given.side(1024), width=given.side(1024), num_inference_steps=given.steps(30))
image.save(given.out / "flux_dev.png")
image = pipe(
    prompt=prompt,
    negative_prompt="blurry, low quality",
    cfg_scale=2,
    seed=0,
    height=given.side(1024),
    width=given.side(1024),
    num_inference_steps=given.steps(50),
)
image.save(given.out / "flux_dev_cfg.png")
