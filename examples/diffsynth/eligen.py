"""EliGen: entities in places of their own, each with its prompt and mask."""

import options
from PIL import Image, ImageDraw

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

pipe.load_lora(pipe.dit, ModelConfig(model_id="DiffSynth-Studio/Eligen", origin_file_pattern="model_bf16.safetensors", **given.file))
side = given.side(1024)
masks = []
for left in (0, side // 2):
    mask = Image.new("RGB", (side, side))
    ImageDraw.Draw(mask).rectangle((left + side // 16, side // 4, left + side // 2 - side // 16, side - side // 16), fill="white")
    masks.append(mask)
image = pipe(
    prompt="two animals in front of a window",
    negative_prompt="blurry, low quality",
    cfg_scale=3.0,
    eligen_entity_prompts=["a white cat", "a brown dog"],
    eligen_entity_masks=masks,
    seed=0,
    height=side,
    width=side,
    num_inference_steps=given.steps(50),
)
image.save(given.out / "eligen.png")
