"""Nexus-GenV2: a language model thinks of the picture that the transformer draws."""

import options

from fluxsmith.dialects.diffsynth import FluxImagePipeline, ModelConfig

given = options.parse(__doc__)
pipe = FluxImagePipeline.from_pretrained(
    torch_dtype=given.dtype,
    device=given.device,
    model_configs=[
        ModelConfig(model_id="DiffSynth-Studio/Nexus-GenV2", origin_file_pattern="model*.safetensors", **given.file),
        ModelConfig(model_id="DiffSynth-Studio/Nexus-GenV2", origin_file_pattern="generation_decoder.bin", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="text_encoder/model.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="text_encoder_2/*.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="ae.safetensors", **given.file),
    ],
    nexus_gen_processor_config=ModelConfig(model_id="DiffSynth-Studio/Nexus-GenV2", origin_file_pattern="processor/", **given.file),
    vram_limit=given.vram_limit,
)

image = pipe(prompt="a cute cat", cfg_scale=3, seed=0, height=given.side(1024), width=given.side(1024), num_inference_steps=given.steps(50))
image.save(given.out / "nexus_gen.png")
