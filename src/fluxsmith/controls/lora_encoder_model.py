"""The LoRA encoder of DiffSynth-Studio: what a LoRA does to learned rows, layer by layer, becomes one text token.

Layer i: x_i A^T B^T, LayerNorm, a linear of the layer's kind. The special token before all of them goes through pre-norm
transformer layers and comes out as the token.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxsmith.adapters.additive import Additive
from fluxsmith.adapters.formats.files import read_adapter
from fluxsmith.adapters.formats.state import AdapterState, LayerState
from fluxsmith.adapters.load import part_module
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.io.keymaps import MAPS
from fluxsmith.models.fill import check_keys, fill, finish, meta, shapes_of
from fluxsmith.models.linear import Linear
from fluxsmith.models.load import opened

HEAD = 128  # of the published file
ROWS = re.compile(r"embedder\.model_dict\.(.+)\.x")
LAYER = re.compile(r"(?:single_)?blocks___\d+___(.+)")
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class LoraEncoderParams:
    """Sizes: all but the heads are read from tensors."""

    layers: Mapping[str, tuple[int, int, int]]  # name in the file -> learned rows, inputs, outputs
    width: int
    specials: int
    mlp_hidden: int
    depth: int
    heads: int

    @classmethod
    def from_shapes(cls, shapes: Shapes, heads: int | None = None) -> "LoraEncoderParams":
        """Read sizes; heads are 128 wide unless given. Raises ModelFileError where a key that carries a size is missing."""
        try:
            _, specials, width = shapes["special_embeds"]
            mlp_hidden = shapes["encoders.0.fc1.weight"][0]
            layers = {}
            for found in filter(None, map(ROWS.fullmatch, shapes)):
                _, rows, inputs = shapes[found[0]]
                layers[found[1]] = (rows, inputs, shapes[f"embedder.model_dict.{found[1]}.layer_norm.weight"][0])
        except KeyError as missing:
            raise ModelFileError(f"the LoRA encoder's size cannot be read: {missing} is missing", fix="get a complete file") from None
        depth = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("encoders."))
        heads = heads or width // HEAD
        if not heads or width % heads:
            why = f"{width} features do not divide into {heads or 'heads of 128'}"
            raise ConfigError("the LoRA encoder's heads do not fit", why=why, fix="set control.heads")
        return cls(layers, width, specials, mlp_hidden, depth, heads)


class LayerRows(nn.Module):
    """Learned inputs of one layer, and the norm of what comes out of it."""

    def __init__(self, rows: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(1, rows, inputs))
        self.layer_norm = nn.LayerNorm(outputs)


class Attention(nn.Module):
    """Plain self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Pre-norm, with x * sigmoid(1.702 x) between the linears."""

    def __init__(self, params: LoraEncoderParams) -> None:
        super().__init__()
        width, hidden = params.width, params.mlp_hidden
        self.attn = Attention(width, params.heads)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = Linear(width, hidden), Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x = x + self.attn(self.layer_norm1(x))
        hidden = self.fc1(self.layer_norm2(x))
        return x + self.fc2(hidden * torch.sigmoid(1.702 * hidden))


class Embedder(nn.Module):
    """A LoRA -> one row for every learned input of every layer."""

    def __init__(self, params: LoraEncoderParams) -> None:
        super().__init__()
        self.model_dict = nn.ModuleDict({name: LayerRows(*sizes) for name, sizes in params.layers.items()})
        outputs = {kind_of(name): sizes[2] for name, sizes in params.layers.items()}
        self.proj_dict = nn.ModuleDict({kind: Linear(width, params.width) for kind, width in outputs.items()})

    def forward(self, layers: Mapping[str, LayerState]) -> Tensor:
        """Layers by their names in the file -> (1, sum of rows, D)."""
        made = []
        for name, own in self.model_dict.items():
            if not isinstance(own, LayerRows):
                raise TypeError(name)
            seen = own.layer_norm(answer(own.x, layers[name], own.layer_norm.normalized_shape[0]))
            made.append(self.proj_dict[kind_of(name)](seen))
        return torch.cat(made, dim=1)


class LoraEncoder(nn.Module):
    """`encoder.token(state)`: one row (1, 1, D) for a LoRA."""

    def __init__(self, params: LoraEncoderParams) -> None:
        super().__init__()
        self.params = params
        self.paths = {name: path_of(name) for name in params.layers}
        self.embedder = Embedder(params)
        self.special_embeds = nn.Parameter(torch.zeros(1, params.specials, params.width))
        self.encoders = nn.ModuleList(EncoderLayer(params) for _ in range(params.depth))
        self.final_layer_norm = nn.LayerNorm(params.width)
        self.final_linear = Linear(params.width, params.width)

    def token(self, state: AdapterState, where: str = "") -> Tensor:
        """The token (1, 1, D) of a LoRA. Raises ModelFileError that names the layers it lacks, or that are no plain additions."""
        missing = [path for path in self.paths.values() if path not in state.layers]
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            what = f"{len(missing)} of the {len(self.paths)} layers that the LoRA encoder reads are missing: {shown}"
            raise ModelFileError(what, where=where, why="it was made for LoRAs of all layers", fix="use a LoRA with targets = all")
        try:
            rows = self.embedder({name: state.layers[path] for name, path in self.paths.items()})
        except ModelFileError as error:
            problem = error.problems[0]
            raise ModelFileError(problem.what, where=where, why=problem.why, fix=problem.fix) from error
        x = torch.cat((self.special_embeds, rows), dim=1)
        for layer in self.encoders:
            x = layer(x)
        return self.final_linear(self.final_layer_norm(x[:, :1]))


def answer(x: Tensor, layer: LayerState, out_features: int) -> Tensor:
    """What a layer of a LoRA adds for inputs x (1, R, in): (1, R, out)."""
    if layer.in_features not in (None, x.shape[-1]) or layer.out_features not in (None, out_features):
        why = f"{layer.out_features} x {layer.in_features} against {out_features} x {x.shape[-1]}"
        raise ModelFileError(
            "the LoRA is for a model of another size", why=why, fix="use a LoRA of the model that the encoder was made for"
        )
    made = x.new_zeros(*x.shape[:-1], out_features)
    for part in layer.parts:
        module = part_module(part).to(x.device)
        if not isinstance(module, Additive) or module.magnitude is not None:
            raise ModelFileError(
                f"the LoRA encoder cannot read {layer.kind}", why="only what is added to a weight can be encoded", fix="use a LoRA"
            )
        made[..., part.start : part.stop] += module.product(x, x.new_ones(())).to(x.dtype)
    return made


def kind_of(name: str) -> str:
    """`blocks___0___ff_a___2` -> `ff_a___2`: layers of a kind share a linear. Raises ModelFileError for other names."""
    found = LAYER.fullmatch(name)
    if found is None:
        raise ModelFileError(f"the LoRA encoder has an unknown layer {name}", fix="get the original file")
    return found[1]


def path_of(name: str) -> str:
    """The adapter's path of a layer: `dit.double_blocks.0.txt_mlp.2`. Raises ModelFileError for a name that no table knows."""
    place = MAPS["diffsynth"].bfl_layer(name.replace("___", "."))
    if place is None:
        raise ModelFileError(f"the LoRA encoder has an unknown layer {name}", fix="get the original file")
    return f"dit.{place.name}"


def load_lora_encoder(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, heads: int | None = None
) -> LoraEncoder:
    """Read the file, in eval mode. Raises ModelFileError for a wrong, incomplete or broken file."""
    with opened(path, "lora_encoder") as file:
        net = meta(lambda: LoraEncoder(LoraEncoderParams.from_shapes(file.shapes, heads)))
        check_keys(shapes_of(net), file.shapes, file.where)
        fill(net, {key: source.read for key, source in file.tensors.items()}, device=device, dtype=dtype)
        finish(net)
    return net.requires_grad_(False)


def encoded(net: LoraEncoder, path: Path | str) -> Tensor:
    """The token (1, 1, D) of a LoRA file of any readable format."""
    return net.token(read_adapter(path), str(path))
