"""AttriCtrl: how bright a picture is, by a number from 0 to 1."""

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
        ModelConfig(model_id="DiffSynth-Studio/AttriCtrl-FLUX.1-Dev", origin_file_pattern="models/brightness.safetensors", **given.file),
    ],
    vram_limit=given.vram_limit,
)

for value in (0.1, 0.9):
    image = pipe(
        prompt="a cat on the beach",
        value_controller_inputs=[value],
        seed=2,
        height=given.side(1024),
        width=given.side(1024),
        num_inference_steps=given.steps(30),
    )
    image.save(given.out / f"attrictrl_{value}.png")
