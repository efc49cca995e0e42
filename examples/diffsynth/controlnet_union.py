"""ControlNet Union: edges and a blurred copy of a picture hold another one together."""

import options
from PIL import ImageFilter

from fluxsmith.dialects.diffsynth import Annotator, ControlNetInput, FluxImagePipeline, ModelConfig

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
            model_id="InstantX/FLUX.1-dev-Controlnet-Union-alpha", origin_file_pattern="diffusion_pytorch_model.safetensors", **given.file
        ),
    ],
    vram_limit=given.vram_limit,
)

size = {"height": given.side(1024), "width": given.side(1024), "num_inference_steps": given.steps(30)}
first = pipe(prompt="a dancer in a red dress, full body, summer", seed=6, **size)
first.save(given.out / "union_1.png")
edges = Annotator("canny")(first)
edges.save(given.out / "union_edges.png")
inputs = [
    ControlNetInput(image=edges, scale=0.3, processor_id="canny"),
    ControlNetInput(image=first.filter(ImageFilter.GaussianBlur(8)), scale=0.3, processor_id="blur", end=0.5),
]
pipe(prompt="a dancer in a red dress, full body, winter", controlnet_inputs=inputs, seed=7, **size).save(given.out / "union_2.png")
