"""The adapter of one layer: one part for all output rows, or parts of a fused layer (q, k, v, mlp), each of some kind.

A kind is a subclass of PartModule in the file of its name: `update` (the forward), `delta` (what merging adds), and, if its tensors
are more than parameters to train, what it stores. `LayerAdapter(parts, out_features)` puts them in their rows.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fluxsmith.adapters.base import Adapter, AdapterSet
from fluxsmith.adapters.formats.state import LayerState, Part
from fluxsmith.errors import ModelFileError
from fluxsmith.models.linear import Factors, Linear


class PartModule(nn.Module):
    """Output rows start..stop of a layer. The tensors of its `Part` become parameters under their names; integers stay as they are."""

    kind: ClassVar[str] = ""
    optional: ClassVar[tuple[str, ...]] = ("bias",)
    """Tensors that are None where a part has none."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.name, self.rows, self.alpha, self.rule = part.name, (part.start, part.stop), part.alpha, part.rule
        self.fixed = {name: tensor for name, tensor in part.tensors.items() if not tensor.is_floating_point()}
        self.base_ref: tuple[Linear] | tuple[()] = ()
        for name in self.optional:
            self.register_parameter(name, None)
        for name, tensor in part.tensors.items():
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor.detach().clone()))

    # ---- what a kind overrides --------------------------------------------------------------------------------------

    def update(self, x: Tensor, y: Tensor, strength: Tensor) -> Tensor:
        """Layer input x (..., in) and these rows of the output so far, without bias, (..., rows) -> the rows with the adapter."""
        raise NotImplementedError

    def delta(self, weight: Tensor, strength: float) -> Tensor:
        """What merging adds to these rows of the weight, (rows, in), float32."""
        raise NotImplementedError

    def factors(self) -> Factors | None:
        """down, up and scale (without strength), if that is all the part does now; None otherwise."""
        return None

    def bias_delta(self, strength: float) -> Tensor | None:
        """What merging adds to these rows of the bias; None for nothing."""
        return None if self.bias is None else self.bias.detach().float() * strength

    def carrier(self) -> str | None:
        """The tensor that takes a factor when a file of another strength is loaded; None: the file's alpha is taken over."""
        return None

    def norm(self) -> float | None:
        """Frobenius norm of what it adds at strength 1, where `max_norm` can limit it."""
        return None

    def limit(self, ratio: float) -> None:
        """Make what it adds smaller by this factor."""

    def after_backward(self) -> None:
        """As Adapter.after_backward."""

    def after_step(self) -> dict[str, float]:
        """As Adapter.after_step, after norms were limited."""
        return {}

    def extra(self) -> dict[str, Tensor]:
        """As Adapter.extra."""
        return {}

    def load_extra(self, values: Mapping[str, Tensor]) -> None:
        """As Adapter.load_extra."""

    # ---- what all kinds share ---------------------------------------------------------------------------------------

    bias: Tensor | None

    def bind(self, base: Linear) -> None:
        """Tell the part its layer, for kinds that need its weight. No submodule: the layer holds the adapter, not the reverse."""
        self.base_ref = (base,)

    def base_rows(self) -> Tensor:
        """The layer's own weight of these rows, (rows, in)."""
        return self._base().dequantize()[self.rows[0] : self.rows[1]]

    def base_product(self, x: Tensor) -> Tensor:
        """These rows of W x for another input: (..., in) -> (..., rows)."""
        return self._base().matmul(x)[..., self.rows[0] : self.rows[1]]

    def _base(self) -> Linear:
        if not self.base_ref:
            raise ValueError(f"a {self.kind} adapter needs the layer it is for: use it through an AdapterSet")
        return self.base_ref[0]

    def input(self, x: Tensor, tensor: Tensor) -> Tensor:
        """x in the type of the factors, unless autocast sees to it."""
        return x if torch.is_autocast_enabled(x.device.type) else x.to(tensor.dtype)

    def tensors(self) -> dict[str, nn.Parameter]:
        """Trained tensors by name."""
        return dict(self.named_parameters(recurse=False))

    def part(self, values: Mapping[str, Tensor]) -> Part:
        """What goes into a file, with `values` in place of the parameters."""
        tensors = {name: values[name].detach().cpu() for name in self.tensors()}
        return Part(self.name, *self.rows, self.kind, tensors | self.fixed, self.alpha, self.rule)

    @torch.no_grad()
    def load(self, part: Part) -> None:
        """Take a file's tensors; the layer then does exactly what the file says. Raises ModelFileError if they do not fit."""
        own = self.tensors()
        theirs = {name: tensor for name, tensor in part.tensors.items() if name not in self.fixed}
        if part.kind != self.kind or set(own) != set(theirs):
            why = f"{part.kind} ({', '.join(sorted(theirs))}) against {self.kind} ({', '.join(sorted(own))})"
            raise ModelFileError("the file has another kind of adapter", why=why)
        wrong = [name for name in own if own[name].shape != theirs[name].shape]
        if wrong:
            why = "; ".join(f"{name} {tuple(theirs[name].shape)} against {tuple(own[name].shape)}" for name in wrong)
            raise ModelFileError("the file's factors have other sizes than the adapter's", why=why)
        for name, param in own.items():
            param.copy_(theirs[name])
        carrier = self.carrier()
        if carrier is None:
            self.alpha = part.alpha
        elif part.alpha != self.alpha:
            own[carrier].mul_(part.alpha / self.alpha)


class LayerAdapter(Adapter):
    """The parts of one layer in row order; rows without a part stay as they are."""

    module_dropout = 0.0

    def __init__(self, parts: Sequence[PartModule], out_features: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(sorted(parts, key=lambda part: part.rows))
        self.out_features = out_features

    def members(self) -> list[PartModule]:
        """The parts."""
        return [part for part in self.parts if isinstance(part, PartModule)]

    def bind(self, base: Linear) -> None:
        """As Adapter.bind."""
        for part in self.members():
            part.bind(base)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """As Adapter.forward. Dropout draws from torch's global generator, in train mode only."""
        if not self.is_enabled or self._skips():
            return y
        parts = self.members()
        if len(parts) == 1 and parts[0].rows == (0, self.out_features):
            return self._part(parts[0], x, y)
        pieces, row = [], 0
        for part in parts:
            start, stop = part.rows
            if start > row:
                pieces.append(y[..., row:start])
            pieces.append(self._part(part, x, y[..., start:stop]))
            row = stop
        if row < self.out_features:
            pieces.append(y[..., row:])
        return torch.cat(pieces, dim=-1)

    def factors(self) -> Factors | None:
        """As Adapter.factors."""
        parts = self.members()
        if not self.is_enabled or len(parts) != 1 or parts[0].rows != (0, self.out_features) or (self.training and self.module_dropout):
            return None
        found = parts[0].factors()
        return None if found is None else (found[0], found[1], found[2] * self.strength)

    def _part(self, part: PartModule, x: Tensor, y: Tensor) -> Tensor:
        made = part.update(x, y, self.strength).to(y.dtype)
        return made if part.bias is None else made + (part.bias * self.strength).to(y.dtype)

    def _skips(self) -> bool:
        return self.training and self.module_dropout > 0 and bool(torch.rand(()) < self.module_dropout)

    @torch.no_grad()
    def delta(self, weight: Tensor) -> Tensor:
        """As Adapter.delta."""
        made = torch.zeros_like(weight, dtype=torch.float32)
        for part in self.members():
            start, stop = part.rows
            made[start:stop] = part.delta(weight[start:stop].float(), float(self.strength))
        return made

    @torch.no_grad()
    def bias_delta(self) -> Tensor | None:
        """As Adapter.bias_delta."""
        found = [(part.rows, value) for part in self.members() if (value := part.bias_delta(float(self.strength))) is not None]
        if not found:
            return None
        made = found[0][1].new_zeros(self.out_features)
        for (start, stop), value in found:
            made[start:stop] = value
        return made

    def after_backward(self) -> None:
        """As Adapter.after_backward."""
        for part in self.members():
            part.after_backward()

    @torch.no_grad()
    def after_step(self, max_norm: float | None) -> dict[str, float]:
        """As Adapter.after_step; a split layer is limited as the one layer that its file will hold."""
        made: dict[str, float] = {}
        if max_norm is not None:
            norms = [norm for part in self.members() if (norm := part.norm()) is not None]
            if norms:
                norm = sum(value**2 for value in norms) ** 0.5
                made = {"key_norm": min(norm, max_norm), "scaled": float(norm > max_norm)}
                if norm > max_norm:
                    for part in self.members():
                        part.limit(max_norm / norm)
        for part in self.members():
            made |= part.after_step()
        return made

    def extra(self) -> dict[str, Tensor]:
        """As Adapter.extra."""
        return {prefix(part) + name: value for part in self.members() for name, value in part.extra().items()}

    def load_extra(self, values: Mapping[str, Tensor]) -> None:
        """As Adapter.load_extra."""
        for part in self.members():
            own = {name.removeprefix(prefix(part)): value for name, value in values.items() if name.startswith(prefix(part))}
            part.load_extra(own)

    def tensors(self) -> dict[str, nn.Parameter]:
        """As Adapter.tensors: `down`, `up`, or `q.down`, `q.up`, ..."""
        return {prefix(part) + name: param for part in self.members() for name, param in part.tensors().items()}

    def state(self, values: Mapping[str, Tensor]) -> LayerState:
        """As Adapter.state."""
        made = [part.part({name: values[prefix(part) + name] for name in part.tensors()}) for part in self.members()]
        base = self.members()[0].base_ref
        return LayerState(tuple(made), self.out_features, base[0].in_features if base else None)

    def load(self, state: LayerState) -> None:
        """As Adapter.load."""
        own = {part.name: part for part in self.members()}
        if set(own) != {part.name for part in state.parts}:
            theirs = ", ".join(part.name or "whole" for part in state.parts)
            raise ModelFileError(f"the file has factors for {theirs}, the adapter for {', '.join(name or 'whole' for name in own)}")
        for part in state.parts:
            own[part.name].load(part)


def prefix(part: PartModule) -> str:
    """`q.` for the part q, nothing for a whole layer."""
    return f"{part.name}." if part.name else ""


def part_modules(made: AdapterSet, path: str | None = None) -> list[PartModule]:
    """The parts of a set, or of one of its layers (none if it is not adapted)."""
    adapters = made.modules if path is None else [made.adapters[path]] if path in made.adapters else []
    return [part for adapter in adapters if isinstance(adapter, LayerAdapter) for part in adapter.members()]
