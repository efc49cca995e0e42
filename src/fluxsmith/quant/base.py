"""Quantised layers (seam 5): subclasses of Linear that override `matmul` and `dequantize`; adapters never notice.

`quantise(realise(config.quant), "dit", dit)` replaces the Linears of a model in place; `by_block` does it while the model is read, so
that no more than one block is ever there in full.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from fluxsmith.config.choice import config_class, realise
from fluxsmith.config.quant import QuantConfig
from fluxsmith.io.canonical import Source
from fluxsmith.models.fill import ByBlock
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.linear import Linear
from fluxsmith.models.loading import Loading
from fluxsmith.quant.products import Unpack, late

Parts = Mapping[str, Tensor]
MODULATIONS = (".img_mod.lin", ".txt_mod.lin", ".modulation.lin")
STACKS = ("double_blocks.", "single_blocks.")


class QuantLinear(Linear):
    """A frozen weight in few bits. `weight` holds the stored form as int8 bytes; what adapters merge into is `dequantize()`.

    As int8, because transformers' T5 casts what it feeds a layer to the type of its weight, unless that is int8.
    """

    form: ClassVar[str] = ""

    @classmethod
    def made(cls, linear: Linear, parts: Parts) -> Self:
        """The layer in the place of another, from its stored tensors (the values under ""); bias and adapters move along."""
        own = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        own.weight = nn.Parameter(parts[""].view(torch.int8), requires_grad=False)
        own.bias = linear.bias
        own.adapters = linear.adapters
        for name, tensor in parts.items():
            if name:
                own.register_buffer(name, tensor, persistent=False)
        return own

    def parts(self) -> dict[str, Tensor]:
        """What a file holds of the weight, as `made` takes it."""
        return {"": self.weight.detach(), **dict(self.named_buffers(recurse=False))}

    def stored_bytes(self) -> int:
        """Memory of the weight and what belongs to it."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.parts().values())

    def bytes_per_weight(self) -> float:
        """`stored_bytes` / number of weights."""
        return self.stored_bytes() / (self.in_features * self.out_features)

    def stepwise(self, input: Tensor) -> Tensor:
        """As Linear.stepwise; the bias in the type of the product."""
        y = self.matmul(input)
        for adapter in self.adapters.values():
            y = adapter(input, y)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return super().forward(input) if self.adapters else self.stepwise(input)

    def whole(self, inputs: Sequence[Tensor], gelu: Sequence[bool] = (), heights: Sequence[int] = ()) -> tuple[Tensor, ...]:
        """As Linear.whole."""
        acts = [F.gelu(x, approximate="tanh") if raw else x for x, raw in zip(inputs, gelu or (False,) * len(inputs), strict=True)]
        y = self.stepwise(acts[0] if len(acts) == 1 else torch.cat(acts, dim=-1))
        return tuple(y.split(list(heights), dim=-1)) if heights else (y,)


class FrozenProduct(torch.autograd.Function):
    """x W^T, where W is unpacked for the product and once more for the gradient: between them only its few bits are kept.

    `unpack(dtype, *stored)` is W (out, in), or W without the factor `row` (out, 1), which then multiplies the product.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, unpack: Unpack, row: Tensor | None, *stored: Tensor) -> Tensor:
        ctx.save_for_backward(row, *stored)  # type: ignore[arg-type]  # None may be saved
        ctx.unpack = unpack  # type: ignore[attr-defined]
        y = F.linear(x, unpack(x.dtype, *stored))
        return y if row is None else y * row.flatten().to(y.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # as this function's forward
        row, weight, *rest = ctx.saved_tensors  # type: ignore[attr-defined]
        stored = (late(weight, grad), *rest)
        grad = grad if row is None else grad * row.flatten().to(grad.dtype)
        return grad @ ctx.unpack(grad.dtype, *stored), None, None, *[None] * len(stored)  # type: ignore[attr-defined]


def in_compute_type(x: Tensor) -> Tensor:
    """x in the type that products are computed in: autocast's, or its own."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def plugin(kind: str) -> Any:
    """The `Config` of a kind, with its defaults."""
    return realise(config_class("fluxsmith.quant", kind)(type=kind))


def config_for(config: Any, path: str, linear: Linear) -> Any:
    """The quantiser of one layer (`dit.double_blocks.0.img_mod.lin`), or None where the layer stays as it is."""
    role, _, name = path.partition(".")
    if not config.can_take(linear.in_features, linear.out_features):
        config = _like(config, "int8")
    if config.leaves_out(path):
        return None
    if role != "dit":
        return config
    beside = "same" if name.startswith(STACKS) else config.embedders
    if name.startswith(STACKS) and name.endswith(MODULATIONS):
        beside = config.modulation
    return {"same": config, "int8": _like(config, "int8"), "keep": None}[beside]


def _like(config: Any, kind: str) -> Any:
    """Another kind with the options that all kinds share."""
    shared = {name: getattr(config, name) for name in QuantConfig.model_fields if name != "type"}
    return plugin(kind).model_copy(update=shared)


def encoder_config(config: QuantConfig, role: str) -> Any:
    """The quantiser of a text encoder, or None."""
    kind = config.kind_of_encoder(role)
    if not kind:
        return None if kind is None else config
    return _like(config, kind)


@torch.no_grad()
def quantise(config: QuantConfig, role: str, module: nn.Module) -> int:
    """Quantise a model in place: the transformer, or a text encoder where the options ask for it. Returns the number of layers."""
    own = config if isinstance(module, FluxDiT) else encoder_config(config, role)
    if own is None or not hasattr(own, "make"):
        return 0
    return quantise_linears(module, lambda path, linear: layer(own, path, linear), prefix=f"{role}.")


def layer(config: Any, path: str, linear: Linear) -> QuantLinear | None:
    """The quantised form of one layer, on its own device; None where it stays."""
    own = config_for(config, path, linear)
    return None if own is None else own.make(linear, own.encode(linear.weight.detach().float()))


def quantise_linears(module: nn.Module, make: Callable[[str, Linear], QuantLinear | None], *, prefix: str = "") -> int:
    """Replace the Linears below a module one by one; returns how many. What is quantised already stays. Adapters move along."""
    count = 0
    for owner_name, owner in [*module.named_modules()]:
        if isinstance(owner, Linear | nn.ModuleDict):
            continue
        for name, child in [*owner.named_children()]:
            if isinstance(child, Linear) and not isinstance(child, QuantLinear):
                made = make(f"{prefix}{owner_name}.{name}" if owner_name else f"{prefix}{name}", child)
                if made is not None:
                    setattr(owner, name, made)
                    count += 1
    return count


def by_block(config: QuantConfig, role: str, device: torch.device) -> ByBlock | None:
    """How `load_dit` and `load_t5xxl` quantise each block as soon as it is read, for a model that computes on `device`.

    Layers that the file holds in this very kind are taken as they are.
    """
    own = config if role == "dit" else encoder_config(config, role)
    if own is None or not hasattr(own, "make"):
        return None

    def finish(path: str, block: nn.Module) -> None:
        quantise_linears(block, lambda name, linear: layer(own, name, linear), prefix=f"{role}.{path}.")

    def take(path: str, linear: nn.Module, source: Source) -> nn.Module | None:
        chosen = config_for(own, f"{role}.{path}", linear) if isinstance(linear, Linear) else None
        if chosen is None or chosen.type != source.form or source.stored is None:
            return None
        parts = chosen.fitting(source.stored())
        return None if parts is None else chosen.make(linear, parts)

    return ByBlock(torch.device("cpu") if config.via == "cpu" else device, finish, take)


def loading(config: QuantConfig | None, dtype: torch.dtype, device: torch.device, *, dit_device: torch.device | None = None) -> Loading:
    """How `LazyModels` loads parts for a `[quant]` section: quantised block by block while they are read. `dtype` of the transformer.

    Raises ConfigError where the device cannot compute on such a base.
    """
    if config is None:
        return Loading(dtype, dit_device)
    own = realise(config)
    own.require(device)
    options = own.model_dump()
    form = json.dumps(options, sort_keys=True, default=str) if options.get("text_encoders") else ""
    return Loading(dtype, dit_device, lambda role, part: quantise(own, role, part), lambda role: by_block(own, role, device), form)
