"""The FLUX.1 transformer (DiT) in the checkpoint's own key names; it contains no feature.

Everything reaches it through seams: FluxParams (0), Tokens (1), BlockHooks (2, 3), embed / run_blocks / head (4)
and Linear (5). `FluxDiT(FluxParams.from_shapes(shapes))(tokens)` predicts the velocity of the target tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fluxsmith.errors import ModelFileError
from fluxsmith.models.blocks import Block, DoubleStreamBlock, Run, SingleStreamBlock, run_module
from fluxsmith.models.layers import LastLayer, MLPEmbedder, rotary_positions, timestep_embedding
from fluxsmith.models.linear import Linear
from fluxsmith.models.stream import BlockHook, Stream, Tokens

TIME_SINUSOIDS = 256  # width of the sinusoids that time_in and guidance_in take


@dataclass(frozen=True)
class FluxParams:
    """The numbers a FLUX transformer is built from (BFL's names)."""

    in_channels: int
    out_channels: int
    vec_in_dim: int
    context_in_dim: int
    hidden_size: int
    mlp_hidden: int
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: tuple[int, int, int]
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = True

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]], axes_dim: Sequence[int] | None = None) -> "FluxParams":
        """Read every size from tensor shapes in BFL keys; only the rotary axes must be known (or follow FLUX's rule).

        Raises ModelFileError if a key that carries a size is missing.
        """
        try:
            hidden, in_channels = shapes["img_in.weight"]
            has_single = "single_blocks.0.linear1.weight" in shapes  # a ControlNet can do without
            head = shapes["single_blocks.0.norm.query_norm.scale" if has_single else "double_blocks.0.img_attn.norm.query_norm.scale"][0]
            mlp = shapes["single_blocks.0.linear1.weight"][0] - 3 * hidden if has_single else shapes["double_blocks.0.img_mlp.0.weight"][0]
            return cls(
                in_channels=in_channels,
                out_channels=shapes["final_layer.linear.weight"][0],
                vec_in_dim=shapes["vector_in.in_layer.weight"][1],
                context_in_dim=shapes["txt_in.weight"][1],
                hidden_size=hidden,
                mlp_hidden=mlp,
                num_heads=hidden // head,
                depth=count_blocks(shapes, "double_blocks."),
                depth_single_blocks=count_blocks(shapes, "single_blocks."),
                axes_dim=axes_for_head(head) if axes_dim is None else (axes_dim[0], axes_dim[1], axes_dim[2]),
                qkv_bias="double_blocks.0.img_attn.qkv.bias" in shapes,
                guidance_embed="guidance_in.in_layer.weight" in shapes,
            )
        except KeyError as missing:
            raise ModelFileError(
                f"the transformer's size cannot be read: {missing} is missing", fix="use a complete FLUX.1 transformer file"
            ) from None


def count_blocks(shapes: Mapping[str, Sequence[int]], prefix: str) -> int:
    """Highest block index + 1, so that pruned models load."""
    return 1 + max((int(key[len(prefix) :].split(".", 1)[0]) for key in shapes if key.startswith(prefix)), default=-1)


def axes_for_head(head: int) -> tuple[int, int, int]:
    """Rotary axes of a head size: an eighth (a multiple of 4) for the first axis, the rest in halves; 128 gives (16, 56, 56)."""
    first = 4 * -(-head // 32)
    if head < 8 or (head - first) % 4:
        raise ModelFileError(f"no rotary axes are known for a head of {head} channels", fix="give model.axes_dim")
    return first, (head - first) // 2, (head - first) // 2


class FluxDiT(nn.Module):
    """Rectified-flow transformer of FLUX.1: double blocks, then single blocks."""

    visible_padding = 0  # padding tokens after the text that masked attention still sees

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        p = self.params = params
        self.img_in = Linear(p.in_channels, p.hidden_size)
        self.txt_in = Linear(p.context_in_dim, p.hidden_size)
        self._conditioning_layers(p)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(p.hidden_size, p.num_heads, p.mlp_hidden, qkv_bias=p.qkv_bias) for _ in range(p.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(p.hidden_size, p.num_heads, p.mlp_hidden) for _ in range(p.depth_single_blocks)
        )
        if p.depth_single_blocks:
            self.single_blocks[-1].advances_text = False  # type: ignore[assignment]  # a plain attribute
        self.final_layer = LastLayer(p.hidden_size, p.out_channels)
        self.call: Callable[..., tuple[Tensor, Tensor]] = call_block
        self.run_modulation: Run = run_module

    @property
    def blocks(self) -> list[Block]:
        """All blocks in order; their index is what hooks count by."""
        return [block for stack in (self.double_blocks, self.single_blocks) for block in stack if isinstance(block, Block)]

    @property
    def dtype(self) -> torch.dtype:
        """Type of what flows through it: that of the norms, which are never quantised."""
        return next(param.dtype for name, param in self.named_parameters() if name.endswith("_norm.scale"))

    def embed(self, tokens: Tokens) -> Stream:
        """Tokens -> the stream that enters block 0."""
        vec = self.conditioning(tokens.t, tokens.guidance, tokens.y)
        ids = torch.cat((tokens.txt_ids, tokens.img_ids), dim=1)
        pe = rotary_positions(ids, self.params.axes_dim, self.params.theta)
        n_target = tokens.n_target or tokens.img.shape[1]
        return Stream(self.img_in(tokens.img), self.txt_in(tokens.txt), vec, pe, tokens.mask, n_target=n_target)

    def _conditioning_layers(self, params: FluxParams) -> None:
        self.time_in = MLPEmbedder(TIME_SINUSOIDS, params.hidden_size)
        self.vector_in = MLPEmbedder(params.vec_in_dim, params.hidden_size)
        if params.guidance_embed:
            self.guidance_in = MLPEmbedder(TIME_SINUSOIDS, params.hidden_size)

    def conditioning(self, t: Tensor, guidance: Tensor | None, y: Tensor) -> Tensor:
        """Noise level (B,), guidance (B,) and pooled text (B, D_pooled) -> vec (B, D)."""
        vec = self.time_in(timestep_embedding(t, TIME_SINUSOIDS).to(y.dtype))
        if self.params.guidance_embed:
            if guidance is None:
                raise ValueError("this model has a guidance embedder: Tokens.guidance is needed")
            vec = vec + self.guidance_in(timestep_embedding(guidance, TIME_SINUSOIDS).to(y.dtype))
        return vec + self.vector_in(y)

    def run_blocks(self, stream: Stream, hooks: Sequence[BlockHook] = (), start: int = 0, stop: int | None = None) -> Stream:
        """Blocks start..stop-1 with hooks around each: `before` in order, `after` in reverse."""
        for index, block in list(enumerate(self.blocks))[start:stop]:
            for hook in hooks:
                stream = hook.before(index, stream)
            mods = block.modulations(stream.vec, self.run_modulation)
            img, txt = self.call(block, stream.img, stream.txt, mods, stream.pe, stream.mask, stream.ip)
            stream = stream._replace(img=img, txt=txt)
            for hook in reversed(hooks):
                stream = hook.after(index, stream)
        return stream

    def head(self, stream: Stream) -> Tensor:
        """The prediction of the target tokens: (B, n_target, out_channels)."""
        return self.final_layer(stream.img[:, : stream.n_target], stream.vec)

    def forward(self, tokens: Tokens, hooks: Sequence[BlockHook] = ()) -> Tensor:
        """Velocity (noise - clean) of the target tokens, (B, n_target, out_channels)."""
        return self.head(self.run_blocks(self.embed(tokens), hooks))


def call_block(block: nn.Module, *inputs: object) -> tuple[Tensor, Tensor]:
    """Plain call of a block; memory/checkpoint.py puts recomputation in its place."""
    return block(*inputs)
