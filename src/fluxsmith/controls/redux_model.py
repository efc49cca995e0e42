"""Redux' image embedder: every token of SigLIP's last layer becomes a text token (Linear, SiLU, Linear)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxsmith.errors import ModelFileError
from fluxsmith.models.fill import check_keys, fill, finish, meta, shapes_of
from fluxsmith.models.linear import Linear
from fluxsmith.models.load import opened


class ReduxEmbedder(nn.Module):
    """Keys as in the published file."""

    def __init__(self, image_width: int, hidden: int, text_width: int) -> None:
        super().__init__()
        self.redux_up = Linear(image_width, hidden)
        self.redux_down = Linear(hidden, text_width)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> "ReduxEmbedder":
        """Every size from tensor shapes. Raises ModelFileError if a key that carries a size is missing."""
        try:
            hidden, image_width = shapes["redux_up.weight"]
            return cls(image_width, hidden, shapes["redux_down.weight"][0])
        except KeyError as missing:
            raise ModelFileError(f"the image embedder lacks {missing}", fix="download the file again") from None

    def forward(self, tokens: Tensor) -> Tensor:
        """SigLIP's tokens (B, S, image width) -> text tokens (B, S, text width)."""
        return self.redux_down(F.silu(self.redux_up(tokens)))


def load_redux(path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> ReduxEmbedder:
    """Read the file. Raises ModelFileError for a wrong, incomplete or broken one."""
    with opened(path, "image_embedder") as file:
        net = meta(lambda: ReduxEmbedder.from_shapes(file.shapes))
        check_keys(shapes_of(net), file.shapes, file.where)
        fill(net, {key: source.read for key, source in file.tensors.items()}, device=device, dtype=dtype)
        finish(net)
    return net
