"""LoRA encoder: a LoRA's style as a word of the prompt, so that no trigger word is needed."""

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
        ModelConfig(model_id="DiffSynth-Studio/LoRA-Encoder-FLUX.1-Dev", origin_file_pattern="model.safetensors", **given.file),
    ],
    vram_limit=given.vram_limit,
)

lora = ModelConfig(model_id="VoidOc/flux_animal_forest1", origin_file_pattern="20.safetensors", **given.file)
pipe.load_lora(pipe.dit, lora, hotload=True)
size = {"height": given.side(1024), "width": given.side(1024), "num_inference_steps": given.steps(30)}
pipe(prompt="a car", seed=0, lora_encoder_inputs=lora, lora_encoder_scale=0.8, **size).save(given.out / "lora_encoder.png")
pipe(prompt="a car", seed=0, **size).save(given.out / "lora_encoder_without.png")
