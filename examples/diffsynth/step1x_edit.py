"""Step1X-Edit: a picture is changed as the prompt says; a language model reads both."""

import options
from PIL import Image

from fluxsmith.dialects.diffsynth import FluxImagePipeline, ModelConfig

given = options.parse(__doc__)
pipe = FluxImagePipeline.from_pretrained(
    torch_dtype=given.dtype,
    device=given.device,
    model_configs=[
        ModelConfig(model_id="Qwen/Qwen2.5-VL-7B-Instruct", origin_file_pattern="model-*.safetensors", **given.file),
        ModelConfig(model_id="stepfun-ai/Step1X-Edit", origin_file_pattern="step1x-edit-i1258.safetensors", **given.file),
        ModelConfig(model_id="stepfun-ai/Step1X-Edit", origin_file_pattern="vae.safetensors", **given.file),
    ],
    step1x_processor_config=ModelConfig(model_id="Qwen/Qwen2.5-VL-7B-Instruct", **given.file),
    vram_limit=given.vram_limit,
)

size = {"height": given.side(1248), "width": given.side(832), "num_inference_steps": given.steps(30), "cfg_scale": 6}
image = Image.new("RGB", (given.side(832), given.side(1248)), "white")
for number, prompt in enumerate(("draw red flowers in ink", "add more flowers in ink"), start=1):
    image = pipe(prompt=prompt, step1x_reference_image=image, seed=number, **size)
    image.save(given.out / f"step1x_{number}.png")
