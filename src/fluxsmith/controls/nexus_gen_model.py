"""What Nexus-Gen's decoders put between its language model and the transformer: an adapter (drawing) or a merger (editing)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.models.fill import check_keys, fill, finish, meta, shapes_of
from fluxsmith.models.linear import Linear
from fluxsmith.models.load import opened
from fluxsmith.models.qwen_input import MERGE

HEAD = 128  # of the published file
GRID = 72  # patches that every picture's sides are scaled to in the merger's rotary positions
EPS = 1e-6
Grid = tuple[int, int]  # rows and columns of patches; a token is 2 x 2 of them
Shapes = Mapping[str, Sequence[int]]


class Adapter(nn.Sequential):
    """States (1, 81, D) -> text rows (1, 81, D_txt)."""

    def __init__(self, states: int, width: int) -> None:
        super().__init__(Linear(states, width), nn.LayerNorm(width), nn.ReLU(), Linear(width, width), nn.LayerNorm(width))


@dataclass(frozen=True)
class MergerParams:
    """Sizes; all but the heads and the rotary table are read from tensors."""

    states: int
    mlp_hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    width: int
    sections: tuple[int, ...] = ()
    """Pairs of a head that turn with time, row and column: by default one part in four, and the rest halved (16, 24, 24)."""
    theta: float = 1e6

    def __post_init__(self) -> None:
        if not self.sections:
            pairs = self.states // self.heads // 2
            rows = (pairs - pairs // 4) // 2
            object.__setattr__(self, "sections", (pairs // 4, rows, pairs - pairs // 4 - rows))

    @classmethod
    def from_shapes(cls, shapes: Shapes, heads: int | None = None, sections: Sequence[int] | None = None) -> "MergerParams":
        """Read sizes; heads are 128 wide unless given. Raises ModelFileError where a key that carries a size is missing."""
        try:
            mlp_hidden, states = shapes["layers.0.mlp.gate_proj.weight"]
            kv, inner = shapes["layers.0.self_attn.k_proj.weight"][0], shapes["projector.1.weight"][0]
            width = shapes["projector.4.weight"][0]
        except KeyError as missing:
            raise ModelFileError(f"the merger's size cannot be read: {missing} is missing", fix="get a complete file") from None
        heads = heads or states // HEAD
        if not heads or states % heads or kv % (states // heads):
            why = f"{states} features do not divide into {heads or 'heads of 128'}"
            raise ConfigError("the merger's heads do not fit", why=why, fix="set control.heads")
        layers = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("layers."))
        return cls(states, mlp_hidden, layers, heads, kv // (states // heads), inner, width, tuple(sections or ()))


class Norm(nn.Module):
    """x / rms(x) * weight, in fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and type as x."""
        return F.rms_norm(x.float(), (x.shape[-1],), eps=EPS).type_as(x) * self.weight


class Attention(nn.Module):
    """Grouped heads, no causal mask, rotated by position."""

    def __init__(self, params: MergerParams) -> None:
        super().__init__()
        self.head = params.states // params.heads
        self.q_proj = Linear(params.states, params.states)
        self.k_proj, self.v_proj = (Linear(params.states, params.kv_heads * self.head) for _ in range(2))
        self.o_proj = Linear(params.states, params.states, bias=False)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """(B, S, D) and cosines, sines (S, head) -> (B, S, D)."""
        q, k, v = (part(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (turned(one, *table) for one in (q, k))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


class GatedPerceptron(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A layer of the language model's kind that looks both ways."""

    def __init__(self, params: MergerParams) -> None:
        super().__init__()
        self.self_attn = Attention(params)
        self.mlp = GatedPerceptron(params.states, params.mlp_hidden)
        self.input_layernorm, self.post_attention_layernorm = Norm(params.states), Norm(params.states)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x = x + self.self_attn(self.input_layernorm(x), table)
        return x + self.mlp(self.post_attention_layernorm(x))


class Merger(nn.Module):
    """States of the target and of the reference -> text rows of both."""

    def __init__(self, params: MergerParams) -> None:
        super().__init__()
        self.params = params
        self.layers = nn.ModuleList(Layer(params) for _ in range(params.layers))
        states, inner, width = params.states, params.inner, params.width
        self.projector = nn.Sequential(Norm(states), Linear(states, inner), Norm(inner), nn.SiLU(), Linear(inner, width), Norm(width))

    def forward(self, target: Tensor, reference: Tensor, grids: tuple[Grid, Grid]) -> Tensor:
        """(1, T, D), (1, R, D) and both pictures' grids -> (1, T + R, D_txt)."""
        x = torch.cat((target, reference), dim=1)
        table = self.table(places(grids).to(x.device), x.dtype)
        for layer in self.layers:
            x = layer(x, table)
        return self.projector(x)

    def table(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines (S, head) for positions (3, S): sections of pairs take time, row or column."""
        pairs = sum(self.params.sections)
        rates = self.params.theta ** (-torch.arange(pairs, dtype=torch.float32, device=positions.device) / pairs)
        axes = torch.repeat_interleave(torch.arange(3), torch.tensor(self.params.sections)).to(positions.device)
        angles = (positions[axes].T * rates).repeat(1, 2)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + head / 2) of (B, H, S, head) rotated."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def cells(grid: Grid) -> Tensor:
    """Row and column of each token of a picture, (2, rows * columns / 4)."""
    rows, columns = (side // MERGE for side in grid)
    return torch.stack([axis.flatten() for axis in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")]).float()


def places(grids: Sequence[Grid]) -> Tensor:
    """Rotary positions (3, S) in the merger: time 0, rows and columns of every picture scaled to one grid."""
    made = [torch.cat((torch.zeros(1, one.shape[1]), one)) for one in (_scaled(grid, (GRID, GRID)) for grid in grids)]
    return torch.cat(made, dim=1)


def editing_ids(grids: Sequence[Grid], latents: tuple[int, int]) -> Tensor:
    """Ids (1, S, 3) of the merger's rows: which picture, and the place in the one that is drawn (of `latents` rows and columns)."""
    made = [torch.cat((torch.full((1, one.shape[1]), float(n)), one)) for n, one in enumerate(_scaled(grid, latents) for grid in grids)]
    return torch.cat(made, dim=1).T[None]


def _scaled(grid: Grid, size: tuple[int, int]) -> Tensor:
    return cells(grid) * torch.tensor([[size[0] / grid[0]], [size[1] / grid[1]]])


def load_adapter(path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Adapter:
    """From the generation decoder's file, in eval mode. Raises ModelFileError for a file without one, or a broken one."""
    with opened(path, "generation_adapter") as file:
        if "0.weight" not in file.shapes:
            raise ModelFileError("the adapter's size cannot be read: 0.weight is missing", where=str(path), fix="get a complete file")
        width, states = file.shapes["0.weight"]
        net = meta(lambda: Adapter(states, width))
        check_keys(shapes_of(net), file.shapes, file.where)
        fill(net, {key: source.read for key, source in file.tensors.items()}, device=device, dtype=dtype)
        finish(net)
    return net.requires_grad_(False)


def load_merger(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    heads: int | None = None,
    sections: Sequence[int] | None = None,
) -> Merger:
    """From the editing decoder's file, in eval mode. Raises ModelFileError for a file without one, or a broken one."""
    with opened(path, "editing_adapter") as file:
        net = meta(lambda: Merger(MergerParams.from_shapes(file.shapes, heads, sections)))
        check_keys(shapes_of(net), file.shapes, file.where)
        fill(net, {key: source.read for key, source in file.tensors.items()}, device=device, dtype=dtype)
        finish(net)
    return net.requires_grad_(False)
