"""InfiniteYou's projector: a face vector becomes tokens that stand in place of a prompt (a Perceiver resampler, Jaegle et al. 2021).

`load_face_projector(path)(vector)`; heads are 64 channels wide unless given. Key names are the published file's.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxsmith.errors import ModelFileError
from fluxsmith.io.canonical import Source, canonical
from fluxsmith.io.identify import check_role, identify
from fluxsmith.io.scaled import open_scaled
from fluxsmith.models.fill import check_keys, fill, finish, meta, shapes_of
from fluxsmith.models.linear import Linear

HEAD = 64
FORM = "fluxsmith.model"


@dataclass(frozen=True)
class FaceProjectorParams:
    """Sizes; only `num_heads` cannot be read from tensors."""

    face: int
    tokens: int
    width: int
    inner: int
    mlp_hidden: int
    layers: int
    text: int
    num_heads: int

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]], num_heads: int | None = None) -> Self:
        """From tensor shapes. Raises ModelFileError if a key that carries a size is missing."""
        try:
            _, tokens, width = shapes["latents"]
            inner, mlp_hidden = shapes["layers.0.0.to_q.weight"][0], shapes["layers.0.1.1.weight"][0]
            face, text = shapes["proj_in.weight"][1], shapes["proj_out.weight"][0]
        except KeyError as missing:
            raise ModelFileError(f"the face projector's size cannot be read: {missing} is missing", fix="use a complete file") from None
        layers = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("layers."))
        heads = num_heads or inner // HEAD
        if not heads or inner % heads:
            raise ModelFileError(f"a face projector {inner} wide has no standard number of heads", fix="give the number of its heads")
        return cls(face, tokens, width, inner, mlp_hidden, layers, text, heads)


class Reader(nn.Module):
    """Attention of the learned tokens to the face and to themselves."""

    def __init__(self, params: FaceProjectorParams) -> None:
        super().__init__()
        self.num_heads = params.num_heads
        self.norm1 = nn.LayerNorm(params.width)
        self.norm2 = nn.LayerNorm(params.width)
        self.to_q = Linear(params.width, params.inner, bias=False)
        self.to_kv = Linear(params.width, 2 * params.inner, bias=False)
        self.to_out = Linear(params.inner, params.width, bias=False)

    def forward(self, face: Tensor, rows: Tensor) -> Tensor:
        """face (B, 1, W), rows (B, Q, W) -> what is added to the rows."""
        face, rows = self.norm1(face), self.norm2(rows)
        q, k, v = self.to_q(rows), *self.to_kv(torch.cat((face, rows), dim=1)).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FaceProjector(nn.Module):
    """Face vector (B, E) -> tokens (B, Q, text)."""

    def __init__(self, params: FaceProjectorParams) -> None:
        super().__init__()
        p = self.params = params
        self.latents = nn.Parameter(torch.zeros(1, p.tokens, p.width))
        self.proj_in = Linear(p.face, p.width)
        self.layers = nn.ModuleList(nn.ModuleList((Reader(p), _mlp(p))) for _ in range(p.layers))
        self.proj_out = Linear(p.width, p.text)
        self.norm_out = nn.LayerNorm(p.text)

    def forward(self, face: Tensor) -> Tensor:
        """As the class says."""
        seen = self.proj_in(face)[:, None]
        rows = self.latents.expand(face.shape[0], -1, -1)
        for layer in self.layers:
            if not isinstance(layer, nn.ModuleList):
                raise TypeError("layers are pairs")
            read, mlp = layer
            rows = rows + read(seen, rows)
            rows = rows + mlp(rows)
        return self.norm_out(self.proj_out(rows))


def _mlp(params: FaceProjectorParams) -> nn.Sequential:
    up, down = (Linear(*sides, bias=False) for sides in ((params.width, params.mlp_hidden), (params.mlp_hidden, params.width)))
    return nn.Sequential(nn.LayerNorm(params.width), up, nn.GELU(), down)


def load_face_projector(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, num_heads: int | None = None
) -> FaceProjector:
    """Read `image_proj_model.bin`, or the same tensors as safetensors, in eval mode. Raises ModelFileError for another file."""
    with open_scaled(path) as weights:
        identity = check_role(identify(weights), "face_projector", where=str(path))
        sources: dict[str, Source] = canonical(weights, identity, "face_projector")
        shapes = {key: source.shape for key, source in sources.items()}
        heads = num_heads or json.loads(weights.metadata.get(FORM, "{}")).get("num_attention_heads")
        net = meta(lambda: FaceProjector(FaceProjectorParams.from_shapes(shapes, heads)))
        check_keys(shapes_of(net), shapes, str(path))
        fill(net, {key: source.read for key, source in sources.items()}, device=device, dtype=dtype)
        finish(net)
    return net
