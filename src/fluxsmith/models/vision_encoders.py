"""SigLIP and CLIP image towers: a picture -> token rows and a pooled vector. transformers' classes with our Linear in them.

`siglip = load_siglip(path)`; `siglip(siglip_pixels(image, siglip.params.image_size))`. Files may hold the text half too; it is
not read. Sizes come from the tensors; transformers 5 dropped the `vision_model.` level of SigLIP in memory.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, SiglipVisionConfig, SiglipVisionModel

from fluxsmith.errors import ModelFileError
from fluxsmith.io.canonical import Source, canonical
from fluxsmith.io.identify import identify
from fluxsmith.io.safetensors import WeightsFile
from fluxsmith.io.scaled import open_scaled
from fluxsmith.models.fill import check_keys, fill, finish, meta, shapes_of
from fluxsmith.models.linear import adopt_linears

ROOT, PROJECTION = "vision_model.", "visual_projection."
CLASS_TOKEN = f"{ROOT}embeddings.class_embedding"  # CLIP has one, SigLIP has none
PATCHES = f"{ROOT}embeddings.patch_embedding.weight"
SO400M = (1152, 16)  # width and heads of SigLIP's shape-optimised model; all others have heads of 64
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FORM = "fluxsmith.model"


@dataclass(frozen=True)
class VisionParams:
    """Sizes of an image tower; `num_heads` cannot be read from tensors."""

    hidden: int
    mlp_hidden: int
    layers: int
    num_heads: int
    image_size: int
    patch: int
    projection: int = 0

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]], num_heads: int | None = None) -> Self:
        """Read sizes from file keys (with `vision_model.`). Raises ModelFileError where a key that carries a size is missing."""
        try:
            hidden, _, patch, _ = shapes[PATCHES]
            positions = shapes[f"{ROOT}embeddings.position_embedding.weight"][0]
            mlp_hidden = shapes[f"{ROOT}encoder.layers.0.mlp.fc1.weight"][0]
        except KeyError as missing:
            raise ModelFileError(f"the image encoder's size cannot be read: {missing} is missing", fix="use a complete file") from None
        layers = 1 + max(int(key.split(".")[3]) for key in shapes if key.startswith(f"{ROOT}encoder.layers."))
        heads = num_heads or (SO400M[1] if hidden == SO400M[0] else hidden // 64)
        if not heads or hidden % heads:
            raise ModelFileError(f"an image encoder {hidden} wide has no standard number of heads", fix="use a published image encoder")
        is_clip = CLASS_TOKEN in shapes
        side = round((positions - is_clip) ** 0.5) * patch
        projection = shapes.get(f"{PROJECTION}weight", (0,))[0]
        return cls(hidden, mlp_hidden, layers, heads, side if is_clip else _siglip_side(side, patch), patch, projection)


def _siglip_side(side: int, patch: int) -> int:
    """The size pictures are brought to, a multiple of 32: the whole patches of SigLIP 14/384 cover 378 pixels of it."""
    rounded = -(-side // 32) * 32
    return rounded if rounded // patch * patch == side else side


class Seen(NamedTuple):
    """What an image tower makes of pictures."""

    tokens: Tensor  # (B, N, D), after the last norm
    pooled: Tensor  # (B, D)


class SiglipVision(nn.Module):
    """SigLIP's image tower."""

    def __init__(self, params: VisionParams) -> None:
        super().__init__()
        self.params = params
        config = SiglipVisionConfig(
            hidden_size=params.hidden,
            intermediate_size=params.mlp_hidden,
            num_hidden_layers=params.layers,
            num_attention_heads=params.num_heads,
            image_size=params.image_size,
            patch_size=params.patch,
        )
        self.model = SiglipVisionModel(config)
        adopt_linears(self.model)

    @staticmethod
    def memory_key(file_key: str) -> str:
        """`vision_model.x` in a file is `x` in transformers 5."""
        return file_key.removeprefix(ROOT)

    def forward(self, pixels: Tensor) -> Seen:
        """Pixels (B, 3, S, S) of `siglip_pixels` -> token rows and the attention-pooled vector."""
        out = self.model(pixel_values=pixels.to(self.model.embeddings.patch_embedding.weight.dtype))
        return Seen(out.last_hidden_state, out.pooler_output)


class ClipVision(nn.Module):
    """CLIP's image tower with its projection into the space that text and pictures share."""

    def __init__(self, params: VisionParams) -> None:
        super().__init__()
        self.params = params
        config = CLIPVisionConfig(
            hidden_size=params.hidden,
            intermediate_size=params.mlp_hidden,
            num_hidden_layers=params.layers,
            num_attention_heads=params.num_heads,
            image_size=params.image_size,
            patch_size=params.patch,
            projection_dim=params.projection,
            hidden_act="quick_gelu",
        )
        self.model = CLIPVisionModelWithProjection(config)
        adopt_linears(self.model)

    @staticmethod
    def memory_key(file_key: str) -> str:
        """File keys are memory keys."""
        return file_key

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) of `clip_pixels` -> image vectors (B, projection)."""
        return self.model(pixel_values=pixels.to(self.model.visual_projection.weight.dtype)).image_embeds


def siglip_pixels(image: Image.Image, size: int = 384) -> Tensor:
    """A picture, stretched to a square (bicubic), as (1, 3, size, size) in [-1, 1]."""
    square = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return _numbers(square).div(127.5).sub(1)


def clip_pixels(image: Image.Image, size: int = 224) -> Tensor:
    """A picture's centre square, scaled (bicubic), as (1, 3, size, size) with CLIP's mean and spread."""
    rgb = image.convert("RGB")
    factor = size / min(rgb.size)
    scaled = rgb.resize((max(size, int(rgb.width * factor)), max(size, int(rgb.height * factor))), Image.Resampling.BICUBIC)
    left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
    square = scaled.crop((left, top, left + size, top + size))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (_numbers(square) / 255 - mean) / std


def _numbers(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()


def load_siglip(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, num_heads: int | None = None
) -> SiglipVision:
    """SigLIP's image tower from a file with or without the text half, frozen and in eval mode. Raises ModelFileError for another file."""
    with open_scaled(path) as weights:
        sources = _vision_tensors(weights, path, "a SigLIP image encoder")
        if CLASS_TOKEN in sources:
            _refuse(weights, path, "a SigLIP image encoder")
        params = VisionParams.from_shapes(_shapes(sources), num_heads or _heads(weights))
        tower = meta(lambda: SiglipVision(params))
        _stream(tower, sources, path, device=device, dtype=dtype)
    return tower


def load_clip_vision(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, num_heads: int | None = None
) -> ClipVision:
    """CLIP's image tower from a file with or without the text half, frozen and in eval mode. Raises ModelFileError for another file."""
    with open_scaled(path) as weights:
        sources = _vision_tensors(weights, path, "a CLIP image encoder with its projection")
        if CLASS_TOKEN not in sources or f"{PROJECTION}weight" not in sources:
            _refuse(weights, path, "a CLIP image encoder with its projection")
        params = VisionParams.from_shapes(_shapes(sources), num_heads or _heads(weights))
        tower = meta(lambda: ClipVision(params))
        _stream(tower, sources, path, device=device, dtype=dtype)
    return tower


def _vision_tensors(weights: WeightsFile, path: Path | str, wanted: str) -> dict[str, Source]:
    """The tensors of the image tower alone; position numbers, which old files hold, are computed."""
    if PATCHES not in weights:
        _refuse(weights, path, wanted)
    found = canonical(weights, identify(weights), "image_encoder")
    return {key: source for key, source in found.items() if key.startswith((ROOT, PROJECTION)) and not key.endswith(".position_ids")}


def _refuse(weights: WeightsFile, path: Path | str, wanted: str) -> None:
    found = identify(weights).describe()
    raise ModelFileError(f"this is {found}, {wanted} was expected ({ROOT}*)", where=str(path), fix="give the right file")


def _shapes(sources: Mapping[str, Source]) -> dict[str, tuple[int, ...]]:
    return {key: source.shape for key, source in sources.items()}


def _heads(weights: WeightsFile) -> int | None:
    """From the file's own metadata (small models that we write)."""
    return json.loads(weights.metadata.get(FORM, "{}")).get("num_attention_heads")


def _stream(
    tower: SiglipVision | ClipVision, sources: Mapping[str, Source], path: Path | str, *, device: torch.device | str, dtype: torch.dtype
) -> None:
    renamed = {tower.memory_key(key): source for key, source in sources.items()}
    check_keys(shapes_of(tower.model), _shapes(renamed), str(path))
    fill(tower.model, {key: source.read for key, source in renamed.items()}, device=device, dtype=dtype)
    embeddings = tower.model.embeddings if isinstance(tower, SiglipVision) else tower.model.vision_model.embeddings
    embeddings.register_buffer("position_ids", torch.arange(embeddings.num_positions, device=device)[None], persistent=False)  # was on meta
    finish(tower)
    tower.requires_grad_(False)
