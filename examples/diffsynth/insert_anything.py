"""Insert-Anything: a thing cut out of one picture is put into another (Fill, Redux and a LoRA)."""

import options
from PIL import Image, ImageDraw

from fluxsmith.dialects.diffsynth import FluxImagePipeline, ModelConfig

given = options.parse(__doc__)
pipe = FluxImagePipeline.from_pretrained(
    torch_dtype=given.dtype,
    device=given.device,
    model_configs=[
        ModelConfig(model_id="black-forest-labs/FLUX.1-Fill-dev", origin_file_pattern="flux1-fill-dev.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-Fill-dev", origin_file_pattern="text_encoder/model.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-Fill-dev", origin_file_pattern="text_encoder_2/*.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-Fill-dev", origin_file_pattern="ae.safetensors", **given.file),
        ModelConfig(model_id="black-forest-labs/FLUX.1-Redux-dev", origin_file_pattern="image_encoder/model.safetensors", **given.file),
        ModelConfig(
            model_id="black-forest-labs/FLUX.1-Redux-dev",
            origin_file_pattern="image_embedder/diffusion_pytorch_model.safetensors",
            **given.file,
        ),
    ],
    vram_limit=given.vram_limit,
)

lora = "20250321_steps5000_pytorch_lora_weights.safetensors"
pipe.load_lora(pipe.dit, ModelConfig(model_id="HuanJue/Insert-Anything", origin_file_pattern=lora, **given.file))
side = given.side(1024)
room, thing = Image.new("RGB", (side, side), "wheat"), Image.new("RGB", (side, side), "white")
ImageDraw.Draw(thing).ellipse((side // 4, side // 4, side * 3 // 4, side * 3 // 4), fill="royalblue")
place, shape = Image.new("L", (side, side)), Image.new("L", (side, side))
ImageDraw.Draw(place).rectangle((side // 3, side // 2, side * 2 // 3, side * 7 // 8), fill=255)
ImageDraw.Draw(shape).ellipse((side // 4, side // 4, side * 3 // 4, side * 3 // 4), fill=255)
image = pipe(
    insert_anything_source_image=room,
    insert_anything_source_mask=place,
    insert_anything_ref_image=thing,
    insert_anything_ref_mask=shape,
    embedded_guidance=30.0,
    seed=666,
    num_inference_steps=given.steps(50),
)
image.save(given.out / "insert_anything.png")
