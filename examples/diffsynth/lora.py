"""A LoRA beside the weights, taken off again, then fused into them."""

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

lora = ModelConfig(model_id="VoidOc/flux_animal_forest1", origin_file_pattern="20.safetensors", **given.file)
options_of_call = {"prompt": "a village square", "seed": 0, "num_inference_steps": given.steps(30)}
size = {"height": given.side(1024), "width": given.side(1024)}
pipe.load_lora(pipe.dit, lora, alpha=0.8, hotload=True)
pipe(**options_of_call, **size).save(given.out / "lora_hot.png")
pipe.clear_lora()
pipe(**options_of_call, **size).save(given.out / "lora_off.png")
if not pipe.vram_management_enabled:
    pipe.load_lora(pipe.dit, lora, alpha=0.8)
    pipe(**options_of_call, **size).save(given.out / "lora_fused.png")
