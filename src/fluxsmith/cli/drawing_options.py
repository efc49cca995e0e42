"""The options of `fluxsmith generate`, one line each, with their help texts."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Prompt = Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw; several make a grid.")]
Model = Annotated[str, typer.Option("--model", help="Transformer file, folder or hub id; flux-shapes is bundled.")]
Preset = Annotated[str, typer.Option("--preset", help="krea, kontext, ... (with --model); dev, schnell and Chroma are recognised.")]
ClipL = Annotated[str, typer.Option("--clip-l", help="CLIP-L file.")]
T5Xxl = Annotated[str, typer.Option("--t5xxl", help="T5-XXL file.")]
Ae = Annotated[str, typer.Option("--ae", help="Autoencoder file.")]
Part = Annotated[
    list[str] | None,
    typer.Option(
        "--part", metavar="NAME=PATH", help="A further part of the model, such as qwen=FOLDER or tokenizer=FOLDER; may be repeated."
    ),
]
Lora = Annotated[list[str] | None, typer.Option("--lora", metavar="FILE[:WEIGHT]", help="A LoRA; may be repeated.")]
LoraFusion = Annotated[str, typer.Option("--lora-fusion", metavar="FILE", help="Weigh the LoRAs against each other by a LoRAFusion model.")]
Negative = Annotated[str, typer.Option("--negative", "-n", help="What to avoid (with --cfg).")]
Steps = Annotated[int | None, typer.Option("--steps", help="Sampling steps; the model's default.")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Embedded guidance; the model's default.")]
Cfg = Annotated[float | None, typer.Option("--cfg", help="True guidance; 1 is off (but for Chroma), others cost twice the time.")]
Seed = Annotated[list[int] | None, typer.Option("--seed", help="Seed of the noise; several make a grid.")]
Width = Annotated[int | None, typer.Option("--width", help="Pixels, a multiple of 16; that of --image or the model's default.")]
Height = Annotated[int | None, typer.Option("--height", help="Pixels, a multiple of 16.")]
Shift = Annotated[str, typer.Option("--shift", help="flux, none, or a number; the model's default.")]
Sampler = Annotated[str, typer.Option("--sampler", help="euler or heun.")]
Image = Annotated[Path | None, typer.Option("--image", help="Start of image to image.")]
Strength = Annotated[float | None, typer.Option("--strength", help="How much of --image is redrawn, 0..1; 0.6 by default.")]
Tile = Annotated[int | None, typer.Option("--tile", help="Autoencoder tile in pixels; 0 never tiles; by default from 1536 x 1536 on.")]
StepCache = Annotated[
    str,
    typer.Option("--step-cache", metavar="KIND:THRESHOLD", help="Skip similar steps: teacache:0.4 or first_block:0.1; off by default."),
]
DenoiseTile = Annotated[
    int | None, typer.Option("--denoise-tile", help="Denoise in windows of this many pixels, for pictures beyond the model's size.")
]
DenoiseOverlap = Annotated[int | None, typer.Option("--denoise-overlap", help="Pixels that windows share; half by default.")]
Control = Annotated[
    list[str] | None,
    typer.Option("--control", metavar="'TYPE KEY=VALUE ...'", help="A control model, such as 'kontext images=cat.png'; may be repeated."),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="Where to draw.")]
VramLimit = Annotated[
    str,
    typer.Option(
        "--vram-limit",
        metavar="GIB",
        help="Keep within this much of the card: parts and layers wait on the host; 0 streams all, none nothing; auto: what is free.",
    ),
]
OffloadDir = Annotated[Path | None, typer.Option("--offload-dir", help="With a limit: layers wait in files of this folder.")]
Quant = Annotated[
    str,
    typer.Option("--quant", metavar="KIND", help="Weights of fewer bits: fp8, int8, int4, int2, nf4; or 'int8 exclude=[\"img_attn\"]'."),
]
Compile = Annotated[bool, typer.Option("--compile", help="Compile each block; worth it for several pictures.")]
Attention = Annotated[str, typer.Option("--attention", help="Attention kernel; auto takes the best that is there.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="PNG file, or folder for several.")]
