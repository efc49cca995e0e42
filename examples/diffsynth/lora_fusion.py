"""LoRAFusion: two LoRAs weighed against each other instead of added up."""

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
        ModelConfig(model_id="DiffSynth-Studio/LoRAFusion-preview-FLUX.1-dev", origin_file_pattern="model.safetensors", **given.file),
    ],
    vram_limit=given.vram_limit,
)

pipe.enable_lora_merger()
for model_id, pattern in (("cancel13/cxsk", "30.safetensors"), ("DiffSynth-Studio/ArtAug-lora-FLUX.1dev-v1", "merged_lora.safetensors")):
    pipe.load_lora(pipe.dit, ModelConfig(model_id=model_id, origin_file_pattern=pattern, **given.file))
image = pipe(prompt="a cat", seed=0, height=given.side(1024), width=given.side(1024), num_inference_steps=given.steps(30))
image.save(given.out / "lora_fusion.png")
