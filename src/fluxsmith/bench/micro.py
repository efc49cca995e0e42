"""Single operations at the model's own sizes: bytes and FLOPs a second of what a block is made of."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fluxsmith.adapters.formats.state import lora_part
from fluxsmith.adapters.load import part_module
from fluxsmith.adapters.rows import LayerAdapter
from fluxsmith.bench.sizes import SPREAD, Size
from fluxsmith.errors import ConfigError
from fluxsmith.models.layers import rotary_positions
from fluxsmith.models.linear import Linear
from fluxsmith.models.ops import LEAN
from fluxsmith.models.packing import image_ids
from fluxsmith.quant.base import plugin

RANK = 16


class Piece(NamedTuple):
    """Something to time."""

    work: Callable[[], object]
    bytes: float
    """Read and written at least."""
    flops: float


def piece(what: str, size: Size, tokens: int, device: torch.device) -> Piece:
    """One of the measurements of `scenarios.MICROS`. Raises ConfigError where the device cannot do it."""
    bench = Bench(size, tokens, device)
    verb, _, kind = what.partition("-")
    if what == "host-copy":
        return bench.host_copy()
    if verb in ("forward", "dx", "unpack"):
        return getattr(bench, verb)(kind)
    return {"modulate": bench.modulate, "heads": bench.heads, "adapter": bench.adapter}[what]()


class Bench:
    """Inputs of the right sizes."""

    def __init__(self, size: Size, tokens: int, device: torch.device) -> None:
        self.params, self.tokens, self.device = size.params, tokens, device
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.generator = torch.Generator(device).manual_seed(0)
        self.wide = torch.empty((), dtype=self.dtype).element_size()

    def random(self, *shape: int, grad: bool = False) -> Tensor:
        """Unit noise."""
        made = torch.empty(shape, device=self.device).normal_(generator=self.generator).to(self.dtype)
        return made.requires_grad_(grad)

    def linear(self, kind: str = "bf16") -> Linear:
        """The largest layer of a single block, frozen, in one of the forms."""
        into, out = self.params.hidden_size, 3 * self.params.hidden_size + self.params.mlp_hidden
        made = Linear(into, out, device=str(self.device)).to(self.dtype).requires_grad_(False)
        made.weight.copy_(self.random(out, into) * SPREAD * into**-0.5)
        if kind == "bf16":
            return made
        config = plugin(kind)
        config.require(self.device)
        return config.make(made, config.encode(made.weight.detach().float()))

    def modulate(self) -> Piece:
        """x, shift and scale, and the gradient of x."""
        h = self.params.hidden_size
        x, shift, scale, grad = (
            self.random(1, self.tokens, h, grad=True),
            *(self.random(1, 1, h) for _ in range(2)),
            self.random(1, self.tokens, h),
        )
        return Piece(lambda: torch.autograd.grad(LEAN.modulate(x, shift, scale), x, grad), 5 * self.wide * x.numel(), 0.0)

    def heads(self) -> Piece:
        """A fused qkv, and its gradient."""
        p, side = self.params, max(2, int(self.tokens**0.5) // 2 * 2)
        n, head = side * side, p.hidden_size // p.num_heads
        qkv = self.random(1, n, 3 * p.hidden_size, grad=True)
        pe = rotary_positions(image_ids(1, 2 * side, 2 * side, device=self.device), p.axes_dim, p.theta)
        ones = torch.ones(head, device=self.device, dtype=self.dtype)
        grads = [self.random(1, p.num_heads, n, head) for _ in range(3)]
        return Piece(
            lambda: torch.autograd.grad(LEAN.heads(qkv, [(n, ones, ones)], pe, p.num_heads), qkv, grads), 4 * self.wide * qkv.numel(), 0.0
        )

    def adapter(self) -> Piece:
        """A LoRA on the largest layer, forward and backward."""
        layer, x = self.linear(), self.random(1, self.tokens, self.params.hidden_size, grad=True)
        down, up = (torch.randn(shape) * shape[1] ** -0.5 for shape in ((RANK, layer.in_features), (layer.out_features, RANK)))
        part = part_module(lora_part("", 0, layer.out_features, down, up, float(RANK)))
        adapter = LayerAdapter([part], layer.out_features).to(self.device, self.dtype)
        adapter.bind(layer)
        layer.adapters["adapter"] = adapter
        grad = self.random(1, self.tokens, layer.out_features)
        inputs = [x, *adapter.parameters()]
        flops = 4.0 * self.tokens * layer.in_features * layer.out_features
        return Piece(lambda: torch.autograd.grad(layer(x), inputs, grad), self.wide * 2 * (x.numel() + grad.numel()), flops)

    def forward(self, kind: str) -> Piece:
        """y = x W^T."""
        layer, x = self.linear(kind), self.random(1, self.tokens, self.params.hidden_size)
        return Piece(lambda: layer(x), self._moved(layer), self._flops(layer))

    def dx(self, kind: str) -> Piece:
        """The gradient of the input, alone."""
        layer, x = self.linear(kind), self.random(1, self.tokens, self.params.hidden_size, grad=True)
        y, grad = layer(x), self.random(1, self.tokens, layer.out_features)
        return Piece(lambda: torch.autograd.grad(y, x, grad, retain_graph=True), self._moved(layer), self._flops(layer))

    def unpack(self, kind: str) -> Piece:
        """The weight in full."""
        layer = self.linear(kind)
        return Piece(layer.dequantize, 4.0 * layer.in_features * layer.out_features, 0.0)

    def host_copy(self) -> Piece:
        """One double block's bytes in 16 bits."""
        if self.device.type != "cuda":
            raise ConfigError("there is no bus to a device", fix="run it on a card")
        h, mlp = self.params.hidden_size, self.params.mlp_hidden
        source = torch.empty(4 * (4 * h * h + 2 * h * mlp), dtype=torch.uint8).pin_memory()
        target = torch.empty_like(source, device=self.device)
        return Piece(lambda: target.copy_(source, non_blocking=True), float(source.numel()), 0.0)

    def _flops(self, layer: Linear) -> float:
        return 2.0 * self.tokens * layer.in_features * layer.out_features

    def _moved(self, layer: Linear) -> float:
        return float(self.wide * self.tokens * (layer.in_features + layer.out_features) + layer.in_features * layer.out_features)
