"""AttriCtrl's value encoder: a number between 0 and 1 becomes text tokens (its sinusoids through two linears, plus learned positions)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fluxsmith.errors import ModelFileError
from fluxsmith.models.fill import check_keys, fill, finish, meta, shapes_of
from fluxsmith.models.layers import timestep_embedding
from fluxsmith.models.linear import Linear
from fluxsmith.models.load import opened


class ValueEncoder(nn.Module):
    """Keys as in the published files."""

    def __init__(self, sinusoids: int, width: int, tokens: int) -> None:
        super().__init__()
        self.sinusoids = sinusoids
        self.prefer_value_embedder = nn.Sequential(Linear(sinusoids, width), nn.SiLU(), Linear(width, width))
        self.positional_embedding = nn.Parameter(torch.zeros(tokens, width))

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> "ValueEncoder":
        """Every size from tensor shapes. Raises ModelFileError if a key that carries a size is missing."""
        try:
            width, sinusoids = shapes["prefer_value_embedder.0.weight"]
            return cls(sinusoids, width, shapes["positional_embedding"][0])
        except KeyError as missing:
            raise ModelFileError(f"the value encoder lacks {missing}", fix="download the file again") from None

    def forward(self, values: Tensor) -> Tensor:
        """Values (B,) in 0..1, fp32 -> text tokens (B, tokens, width)."""
        sinusoids = timestep_embedding(values.float(), self.sinusoids).to(self.positional_embedding.dtype)
        return self.prefer_value_embedder(sinusoids)[:, None] + self.positional_embedding


def load_value_encoder(path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> ValueEncoder:
    """Read one attribute's file. Raises ModelFileError for a wrong, incomplete or broken file."""
    with opened(path, "value_encoder") as file:
        net = meta(lambda: ValueEncoder.from_shapes(file.shapes))
        check_keys(shapes_of(net), file.shapes, file.where)
        fill(net, {key: source.read for key, source in file.tensors.items()}, device=device, dtype=dtype)
        finish(net)
    return net
