"""How large a FLUX model is, counted from tensor shapes alone; no weight is read and no torch is needed.

`shapes_of(FORMS["dev"])` lists every tensor of FLUX.1-dev; a file's header gives the same list for any other model.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Shapes = Mapping[str, Sequence[int]]

BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)$")
MODULATION = re.compile(r"(img_mod|txt_mod|modulation)\.lin\.")
T5XXL, CLIP_L, AUTOENCODER = 4_762_310_656, 123_060_480, 83_819_683  # parameters of the encoders of every FLUX.1
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 4.25 / 8, "int2": 2.25 / 8, "nf4": 4.127 / 8}
"""Bytes a weight, scales included (nf4 double-quantised; int4 and int2 in groups of 128)."""
SINUSOIDS = 256


def evenly_spaced(count: int, total: int) -> list[int]:
    """`count` of `total` layer numbers, evenly spaced, so that every copy has computing to hide behind."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


class Form(NamedTuple):
    """The numbers a FLUX transformer is built from."""

    hidden: int = 3072
    mlp: int = 12_288
    head: int = 128
    depth: int = 19
    depth_single: int = 38
    context: int = 4096
    pooled: int = 768
    channels: int = 64
    guidance: bool = True


FORMS = {"dev": Form(), "schnell": Form(guidance=False)}


def shapes_of(form: Form) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, in the checkpoint's own names."""
    h, mlp, head = form.hidden, form.mlp, form.head
    made: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int) -> None:
        made[f"{name}.weight"], made[f"{name}.bias"] = (out, into), (out,)

    linear("img_in", h, form.channels)
    linear("txt_in", h, form.context)
    for name, width in (("time_in", SINUSOIDS), ("vector_in", form.pooled), *([("guidance_in", SINUSOIDS)] if form.guidance else [])):
        linear(f"{name}.in_layer", h, width)
        linear(f"{name}.out_layer", h, h)
    for block in (f"double_blocks.{i}" for i in range(form.depth)):
        for side in ("img", "txt"):
            linear(f"{block}.{side}_mod.lin", 6 * h, h)
            linear(f"{block}.{side}_attn.qkv", 3 * h, h)
            linear(f"{block}.{side}_attn.proj", h, h)
            linear(f"{block}.{side}_mlp.0", mlp, h)
            linear(f"{block}.{side}_mlp.2", h, mlp)
            made |= {f"{block}.{side}_attn.norm.{part}_norm.scale": (head,) for part in ("query", "key")}
    for block in (f"single_blocks.{i}" for i in range(form.depth_single)):
        linear(f"{block}.linear1", 3 * h + mlp, h)
        linear(f"{block}.linear2", h, h + mlp)
        linear(f"{block}.modulation.lin", 3 * h, h)
        made |= {f"{block}.norm.{part}_norm.scale": (head,) for part in ("query", "key")}
    linear("final_layer.linear", form.channels, h)
    linear("final_layer.adaLN_modulation.1", 2 * h, h)
    return made


class Counts(NamedTuple):
    """Parameters of a transformer by where they live."""

    blocks: tuple[int, ...]
    """Of each block, without its modulation."""
    modulation: int
    """Of the blocks' modulation layers."""
    rest: int
    """Everything else."""
    hidden: int
    mlp: int
    depth: int
    """Double blocks."""
    largest: int
    """Weights of the largest single layer."""
    head: int = 128
    """Channels of an attention head."""
    channels: int = 64
    """Of a packed latent."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.blocks) + self.modulation + self.rest

    @property
    def row(self) -> int:
        """Values of one sample's modulations."""
        return (12 * self.depth + 3 * (len(self.blocks) - self.depth)) * self.hidden


def count(shapes: Shapes) -> Counts:
    """From a header's shapes in the checkpoint's own names."""
    blocks: dict[tuple[str, int], int] = {}
    modulation = rest = 0
    for name, shape in shapes.items():
        size, match = math.prod(shape), BLOCK.match(name)
        if match is None:
            rest += size
        elif MODULATION.match(match[3]):
            modulation += size
        else:
            key = (match[1], int(match[2]))
            blocks[key] = blocks.get(key, 0) + size
    ordered = sorted(blocks)  # "double" before "single"
    doubles = [key for key in ordered if key[0] == "double"]
    hidden = shapes["img_in.weight"][0]
    mlp = shapes["double_blocks.0.img_mlp.0.weight"][0] if doubles else shapes["single_blocks.0.linear1.weight"][0] - 3 * hidden
    head = next((shape[0] for name, shape in shapes.items() if name.endswith("query_norm.scale")), 128)
    in_blocks = [math.prod(shape) for name, shape in shapes.items() if BLOCK.match(name) and not MODULATION.search(name)]
    return Counts(
        tuple(blocks[key] for key in ordered),
        modulation,
        rest,
        hidden,
        mlp,
        len(doubles),
        max(in_blocks, default=0),
        head,
        shapes["img_in.weight"][1],
    )
