"""IP-Adapters (Ye et al. 2023) of FLUX.1: an image encoder's vector becomes tokens, and each block gets keys and values of them.

InstantX: every block, normed keys, no biases. XLabs: double blocks only, biases, no norm. `load_ip_adapter(path)` reads either.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxsmith.errors import ModelFileError
from fluxsmith.io.canonical import Source, canonical
from fluxsmith.io.identify import check_role, identify
from fluxsmith.io.scaled import open_scaled
from fluxsmith.models.fill import check_keys, fill, finish, meta, shapes_of
from fluxsmith.models.linear import Linear

Kind = Literal["instantx", "xlabs"]
KEY_NORM_EPS = 1e-5
NAMES: dict[str, tuple[tuple[re.Pattern[str], str], ...]] = {  # keys of files -> ours
    "instantx": (
        (re.compile(r"image_proj\.(proj|norm)\."), r"\1."),
        (re.compile(r"ip_adapter\.(\d+)\.to_([kv])_ip\."), r"layers.\1.\2."),
    ),
    "xlabs": (
        (re.compile(r"ip_adapter_proj_model\.proj\."), "proj.0."),
        (re.compile(r"ip_adapter_proj_model\.norm\."), "norm."),
        (re.compile(r"double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj\."), r"layers.\1.\2."),
    ),
}


@dataclass(frozen=True)
class IpAdapterParams:
    """Sizes, all from tensors."""

    kind: Kind
    embed: int
    tokens: int
    cross: int
    hidden: int
    layers: int

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]], kind: Kind) -> Self:
        """From tensor shapes in our names. Raises ModelFileError if a key that carries a size is missing."""
        try:
            embed, cross = shapes["proj.0.weight"][1], shapes["norm.weight"][0]
            rows = shapes["proj.2.weight" if kind == "instantx" else "proj.0.weight"][0]
            hidden = shapes["layers.0.k.weight"][0]
        except KeyError as missing:
            raise ModelFileError(f"the IP-Adapter's size cannot be read: {missing} is missing", fix="use a complete file") from None
        layers = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("layers."))
        return cls(kind, embed, rows // cross, cross, hidden, layers)


class KeyValue(NamedTuple):
    """What image queries of one block attend to."""

    key: Tensor  # (1 or B, H, S, D)
    value: Tensor


class Projections(nn.Module):
    """Keys and values of one block."""

    def __init__(self, cross: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.k = Linear(cross, hidden, bias=bias)
        self.v = Linear(cross, hidden, bias=bias)


class IpAdapter(nn.Module):
    """The way from an image vector to tokens, and from tokens to keys and values of every block."""

    def __init__(self, params: IpAdapterParams) -> None:
        super().__init__()
        self.params = params
        p, is_instantx = params, params.kind == "instantx"
        rows, inner = p.tokens * p.cross, 2 * p.embed
        deep = [Linear(p.embed, inner), nn.GELU(), Linear(inner, rows)]
        self.proj = nn.Sequential(*(deep if is_instantx else [Linear(p.embed, rows)]))
        self.norm = nn.LayerNorm(p.cross)
        self.layers = nn.ModuleList(Projections(p.cross, p.hidden, bias=not is_instantx) for _ in range(p.layers))

    def tokens(self, embeds: Tensor) -> Tensor:
        """Vectors of one picture each (P, E), or of each sample of a batch (B, P, E) -> rows (1 or B, P * tokens, cross)."""
        vectors = embeds if embeds.dim() == 3 else embeds[None]
        return self.norm(self.proj(vectors).unflatten(-1, (-1, self.params.cross))).flatten(1, 2)

    def keys_values(self, tokens: Tensor, num_heads: int) -> list[KeyValue]:
        """For every block, from the rows of `tokens`."""
        made = []
        for layer in self.layers:
            if not isinstance(layer, Projections):
                raise TypeError("layers are Projections")
            key, value = (part(tokens).unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (layer.k, layer.v))
            if self.params.kind == "instantx":
                key = F.rms_norm(key.float(), key.shape[-1:], eps=KEY_NORM_EPS).to(key.dtype)
            made.append(KeyValue(key.contiguous(), value.contiguous()))
        return made


def our_name(key: str, kind: Kind) -> str:
    """A file's key in our names; others stay as they are (and are reported)."""
    for pattern, ours in NAMES[kind]:
        if pattern.match(key):
            return pattern.sub(ours, key)
    return key


def load_ip_adapter(path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> IpAdapter:
    """Read a file of either kind, in eval mode. Raises ModelFileError for a wrong, incomplete or broken file."""
    with open_scaled(path) as weights:
        identity = check_role(identify(weights), "ip_adapter", where=str(path))
        kind: Kind = "xlabs" if identity.variant == "xlabs" else "instantx"
        sources: dict[str, Source] = {our_name(key, kind): source for key, source in canonical(weights, identity, "ip_adapter").items()}
        shapes = {key: source.shape for key, source in sources.items()}
        net = meta(lambda: IpAdapter(IpAdapterParams.from_shapes(shapes, kind)))
        check_keys(shapes_of(net), shapes, str(path))
        fill(net, {key: source.read for key, source in sources.items()}, device=device, dtype=dtype)
        finish(net)
    return net
