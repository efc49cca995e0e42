"""Step1X-Edit's connector (Liu et al. 2025): a language model's states become the text, anew at every noise level."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.models.fill import check_keys, fill, finish, meta, shapes_of
from fluxsmith.models.layers import timestep_embedding
from fluxsmith.models.linear import Linear
from fluxsmith.models.load import opened

HEAD = 128  # of the published file
EPS = 1e-6
BLOCKS = "S.individual_token_refiner.blocks."


@dataclass(frozen=True)
class ConnectorParams:
    """Sizes; all but the heads are read from tensors."""

    states: int
    width: int
    mlp_hidden: int
    pooled: int
    depth: int
    heads: int
    frequencies: int = 256

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]], heads: int | None = None) -> "ConnectorParams":
        """Read sizes; heads are 128 wide unless given. Raises ModelFileError where a key that carries a size is missing."""
        try:
            width, states = shapes["S.input_embedder.weight"]
            mlp_hidden, pooled = shapes[f"{BLOCKS}0.mlp.fc1.weight"][0], shapes["global_proj_out.weight"][0]
            frequencies = shapes["S.t_embedder.mlp.0.weight"][1]
        except KeyError as missing:
            raise ModelFileError(f"the connector's size cannot be read: {missing} is missing", fix="get a complete file") from None
        depth = 1 + max(int(key[len(BLOCKS) :].split(".")[0]) for key in shapes if key.startswith(BLOCKS))
        heads = heads or width // HEAD
        if not heads or width % heads:
            why = f"{width} features do not divide into {heads or 'heads of 128'}"
            raise ConfigError("the connector's heads do not fit", why=why, fix="set control.heads")
        return cls(states, width, mlp_hidden, pooled, depth, heads, frequencies)


class Perceptron(nn.Module):
    """Linear, SiLU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(width, hidden), Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(F.silu(self.fc1(x)))


class TimeEmbedder(nn.Module):
    """Noise levels (not multiplied) -> (B, D)."""

    def __init__(self, params: ConnectorParams) -> None:
        super().__init__()
        self.frequencies = params.frequencies
        self.mlp = nn.Sequential(Linear(params.frequencies, params.width), nn.SiLU(), Linear(params.width, params.width))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) -> (B, D)."""
        return self.mlp(timestep_embedding(t.float(), self.frequencies, factor=1.0).to(dtype))


class ContextEmbedder(nn.Module):
    """Mean state -> (B, D)."""

    def __init__(self, params: ConnectorParams) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = Linear(params.states, params.width), Linear(params.width, params.width)

    def forward(self, mean: Tensor) -> Tensor:
        """(B, states) -> (B, D)."""
        return self.linear_2(F.silu(self.linear_1(mean)))


class RefinerBlock(nn.Module):
    """Attention and perceptron, each behind a gate that depends on the noise level and on the whole text."""

    def __init__(self, params: ConnectorParams) -> None:
        super().__init__()
        width, self.heads = params.width, params.heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.self_attn_qkv, self.self_attn_proj = Linear(width, 3 * width), Linear(width, width)
        self.mlp = Perceptron(width, params.mlp_hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor, mask: Tensor) -> Tensor:
        """x (B, S, D), c (B, D), mask (B, 1, S, S) -> (B, S, D)."""
        first, second = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        q, k, v = self.self_attn_qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + self.self_attn_proj(seen) * first
        return x + self.mlp(self.norm2(x)) * second


class Refiner(nn.Module):
    """The blocks, under the name that they have in the file."""

    def __init__(self, params: ConnectorParams) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RefinerBlock(params) for _ in range(params.depth))


class Tokens(nn.Module):
    """States -> text tokens (`S` in the file)."""

    def __init__(self, params: ConnectorParams) -> None:
        super().__init__()
        self.input_embedder = Linear(params.states, params.width)
        self.t_embedder, self.c_embedder = TimeEmbedder(params), ContextEmbedder(params)
        self.individual_token_refiner = Refiner(params)

    def forward(self, states: Tensor, mean: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        """(B, S, states), their mean (B, states), t (B,), mask (B, S) -> (B, S, D); rows of padding are made too."""
        c = self.t_embedder(t, states.dtype) + self.c_embedder(mean)
        pairs = mask[:, None, :, None] & mask[:, None, None, :]
        pairs = torch.cat((torch.ones_like(pairs[..., :1]), pairs[..., 1:]), dim=-1)  # every row sees something
        x = self.input_embedder(states)
        for block in self.individual_token_refiner.blocks:
            x = block(x, c, pairs)
        return x


class Connector(nn.Module):
    """`connector(states, mask, t)` -> text tokens and the pooled state."""

    def __init__(self, params: ConnectorParams) -> None:
        super().__init__()
        self.params = params
        self.S = Tokens(params)
        self.scale_factor = nn.Parameter(torch.zeros(1))
        self.global_proj_out = Linear(params.states, params.pooled)

    def forward(self, states: Tensor, mask: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, S, states), mask (B, S) with True on real ones, t (B,) in [0, 1] -> (B, S, D), (B, pooled)."""
        weight = mask[..., None].to(states.dtype)
        mean = (states * weight).sum(dim=1) / weight.sum(dim=1)
        return self.S(states, mean, t, mask), self.global_proj_out(mean * (1 + self.scale_factor))


def load_connector(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, heads: int | None = None
) -> Connector:
    """Read it from Step1X-Edit's file, in eval mode. Raises ModelFileError for a file without one, or a broken one."""
    with opened(path, "connector") as file:
        net = meta(lambda: Connector(ConnectorParams.from_shapes(file.shapes, heads)))
        check_keys(shapes_of(net), file.shapes, file.where)
        fill(net, {key: source.read for key, source in file.tensors.items()}, device=device, dtype=dtype)
        finish(net)
    return net.requires_grad_(False)
